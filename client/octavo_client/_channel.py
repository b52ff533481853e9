"""How channels are set up: limits, keep-alive, and reconnecting as fast as the caller asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.message import Message

from octavo.v1 import octavo_pb2 as pb
from octavo_client._config import Retry, Timeout
from octavo_client._credentials import CallMetadata, Tls, TokenSource, channel_credentials
from octavo_client._encoding import parse_response
from octavo_client._retry import CallRule

Rpc = tuple[str, Callable[[Any], bytes], Callable[[bytes], Any]]
"""What a channel needs to call an rpc: its path, how to encode a request, how to decode a response."""

Options = list[tuple[str, Any]]
"""A channel's options."""

_KEEPALIVE_MS = 10_000
_KEEPALIVE_TIMEOUT_MS = 5_000
"""Together half of Timeout.step_s: a link that went silent is noticed while a step can still go over another one. The
server permits a ping every 10 s."""

_MAX_OPTION = 2**31 - 1

_SERVICE = "/octavo.v1.OctavoService"


def _encode(message: Message) -> bytes:
    return message.SerializeToString()


# What carries tensors is encoded before it gets here.
APPEND_RPC: Rpc = (f"{_SERVICE}/Append", bytes, pb.AppendResponse.FromString)

DECODE_RPC: Rpc = (f"{_SERVICE}/Decode", bytes, parse_response)

EXPORT_RPC: Rpc = (f"{_SERVICE}/ExportSession", _encode, pb.ExportSessionResponse.FromString)

IMPORT_RPC: Rpc = (f"{_SERVICE}/ImportSession", bytes, pb.ImportSessionResponse.FromString)


def unary_rpc(rule: CallRule) -> Rpc:
    """Return a unary rpc."""
    return f"{_SERVICE}/{rule.name}", _encode, rule.response.FromString


def open_channel(
    api: Any, target: str, options: Options, tls: Tls | None, token: TokenSource | None
) -> Any:
    """Open a channel of `api`, which is grpc or grpc.aio.

    Raises:
        ValueError: A file of `tls` cannot be used, or the token would go to another machine in plain text.
    """
    credentials = channel_credentials(target, tls, token)
    if credentials is None:
        return api.insecure_channel(target, options)
    if tls is not None and tls.server_name is not None:
        options = [*options, ("grpc.ssl_target_name_override", tls.server_name)]
    return api.secure_channel(target, credentials, options)


def calling(rpc: Any, metadata: CallMetadata) -> Any:
    """Return an rpc as a function of a request and a timeout in seconds that sends the client's metadata along."""
    return lambda request, timeout: rpc(request, timeout=timeout, metadata=metadata())


def _milliseconds(seconds: float) -> int:
    return int(min(max(100.0, seconds * 1000), _MAX_OPTION))


def channel_options(timeout: Timeout, retry: Retry) -> Options:
    """Return the options of a client's channel."""
    return [
        # The server's limit is checked before a message is sent, against what the server said.
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        # A Decode stream has no deadline: pings notice that its server is gone, also while it is idle.
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        # Where gRPC times the ping itself, its own default would be a minute.
        ("grpc.http2.ping_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.max_pings_without_data", 0),
        # Attempts are counted by Retry; the channel must not make them wait longer.
        ("grpc.initial_reconnect_backoff_ms", _milliseconds(retry.initial_backoff_s)),
        ("grpc.max_reconnect_backoff_ms", _milliseconds(retry.max_backoff_s)),
        ("grpc.min_reconnect_backoff_ms", _milliseconds(timeout.connect_s)),
        ("grpc.enable_retries", 0),
        # Client and server share a network; http_proxy in the environment is for the way out of it.
        ("grpc.enable_http_proxy", 0),
        # Clients of one process have a connection each, so that they do not queue behind each other.
        ("grpc.use_local_subchannel_pool", 1),
    ]
