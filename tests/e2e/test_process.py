"""The server as a process: the line that names its port, and SIGTERM while work is in flight."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from octavo import v1
from octavo.v1.octavo_pb2_grpc import OctavoServiceStub
from tests.rpc.certificates import Authority

MODEL = "name=tiny,num_layers=1,num_q_heads=8,num_kv_heads=2,head_dim=64,max_context=8192,num_blocks=256"
WAIT_S = 60


FAILING_SERVER = str(Path(__file__).with_name("failing_server.py"))


@contextmanager
def server_process(
    *flags: str, program: tuple[str, ...] = ("-m", "octavo_server")
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Start `octavo-server serve` and give it with the address that it printed."""
    command = [sys.executable, *program, "serve", "--port", "0", "--model", MODEL]
    with subprocess.Popen(
        [*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("listening on 127.0.0.1:"), line
            yield process, line.split()[-1]
        finally:
            process.kill()


def random_step(handle: int, num_tokens: int, start_pos: int = 0) -> v1.DecodeRequest:
    """Return a step of float32 noise that appends to layer 0."""
    rng = np.random.default_rng(3)

    def tensor(num_heads: int) -> v1.Tensor:
        values = rng.standard_normal((num_tokens, num_heads, 64), np.float32)
        return v1.Tensor(data=values.tobytes(), dtype=v1.DATA_TYPE_FLOAT32, shape=values.shape)

    return v1.DecodeRequest(
        step=v1.Step(
            step_id=1,
            session_handles=[handle],
            layers=[0],
            start_pos=[start_pos],
            num_tokens=[num_tokens],
            q=tensor(8),
            k=tensor(2),
            v=tensor(2),
        )
    )


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_is_in_flight(signal_number: signal.Signals) -> None:
    """A prompt of 1,000 tokens keeps the reference backend busy; the signal comes meanwhile."""
    with server_process("--backend", "reference") as (process, address):
        channel = grpc.insecure_channel(address, [("grpc.max_receive_message_length", -1)])
        stub = OctavoServiceStub(channel)  # type: ignore[no-untyped-call]
        request = v1.OpenSessionRequest(model="tiny")
        session = stub.OpenSession(request, timeout=WAIT_S).session
        call = stub.Decode(iter([random_step(session.session_handle, 1000)]), timeout=WAIT_S)
        info = stub.ServerInfo(v1.ServerInfoRequest(), timeout=WAIT_S)
        while info.models[0].num_free_blocks == info.models[0].num_blocks:
            info = stub.ServerInfo(v1.ServerInfoRequest(), timeout=WAIT_S)
        process.send_signal(signal_number)
        result = next(call).result
        assert list(result.out.shape) == [1000, 8, 64]
        assert process.wait(WAIT_S) == 0
        assert process.stderr is not None
        logs = process.stderr.read()
    assert f"{signal_number.name}: finishing what is in flight" in logs
    assert "model tiny: 256 blocks of 32 tokens hold 8,192 tokens in 2,162,688 bytes" in logs
    assert "where FP16 would hold 4,224 tokens" in logs


def cores_by_thread(process_id: int) -> list[set[int]]:
    """Return the cores that each thread of a process may use."""
    return [
        os.sched_getaffinity(int(task.name)) for task in Path(f"/proc/{process_id}/task").iterdir()
    ]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="this machine has one core")
def test_only_the_threads_of_the_kernels_are_pinned() -> None:
    """gRPC's threads, and those that Python starts for calls, stay free after the engine's thread was bound."""
    available = os.sched_getaffinity(0)
    with server_process("--backend", "cpu", "--pin-threads", "true") as (process, address):
        channel = grpc.insecure_channel(address, [("grpc.max_receive_message_length", -1)])
        stub = OctavoServiceStub(channel)  # type: ignore[no-untyped-call]
        for _ in range(3):
            request = v1.OpenSessionRequest(model="tiny")
            session = stub.OpenSession(request, timeout=WAIT_S).session
            stub.DecodeOnce(
                v1.DecodeOnceRequest(step=random_step(session.session_handle, 1000).step),
                timeout=WAIT_S,
            )
        cores = cores_by_thread(process.pid)
    pinned = [one for one in cores if len(one) == 1]
    assert sorted(core for one in pinned for core in one) == sorted(available)
    free = [one for one in cores if len(one) != 1]
    assert free == [available] * len(free)


def test_a_signal_that_another_thread_takes_stops_the_server() -> None:
    """The kernel gives a process's signal to any of its threads; this one stays in a call that nothing else ends."""
    with server_process("--backend", "reference") as (process, _):
        threads = (int(task.name) for task in Path(f"/proc/{process.pid}/task").iterdir())
        other = next(thread_id for thread_id in threads if thread_id != process.pid)
        assert ctypes.CDLL(None).tgkill(process.pid, other, signal.SIGTERM) == 0
        assert process.wait(WAIT_S) == 0


def has_ipv6_loopback() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6_loopback(), reason="this machine has no IPv6 loopback, ::1")
def test_a_device_failure_ends_the_process_with_a_code_of_its_own() -> None:
    """The first step is answered, the second is told of the failure, and so are calls that come after it."""
    with server_process(program=(FAILING_SERVER,)) as (process, address):
        stub = OctavoServiceStub(grpc.insecure_channel(address))  # type: ignore[no-untyped-call]
        request = v1.OpenSessionRequest(model="tiny")
        session = stub.OpenSession(request, timeout=WAIT_S).session
        steps: SimpleQueue[v1.DecodeRequest] = SimpleQueue()
        call = stub.Decode(iter(steps.get, None), timeout=WAIT_S)
        steps.put(random_step(session.session_handle, 2))
        assert list(next(call).result.out.shape) == [2, 8, 64]
        steps.put(random_step(session.session_handle, 2, start_pos=2))
        (detail,) = next(call).result.error.details
        info = error_details_pb2.ErrorInfo()
        assert detail.Unpack(info)
        assert info.reason == "DEVICE_FAILURE"
        with pytest.raises(grpc.RpcError) as ended:
            next(call)
        assert ended.value.code() == grpc.StatusCode.INTERNAL
        assert process.wait(WAIT_S) == 3
        assert process.stderr is not None
        assert "stopped, for the device failed; exit code 3" in process.stderr.read()


def test_an_address_in_brackets_is_listened_on() -> None:
    command = [sys.executable, "-m", "octavo_server", "serve", "--port", "0", "--model", MODEL]
    flags = ["--backend", "reference", "--host", "[::1]"]
    with subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.terminate()
    assert line.startswith("listening on [::1]:")


def test_plain_text_for_everybody_is_asked_for_and_warned_of(
    capfd: pytest.CaptureFixture[str],
) -> None:
    command = [sys.executable, "-m", "octavo_server", "serve", "--port", "0", "--model", MODEL]
    flags = ["--backend", "reference", "--host", "0.0.0.0", "--health-address", "127.0.0.1:0"]
    assert subprocess.run([*command, *flags], check=False, timeout=WAIT_S).returncode == 2
    assert "--host: got '0.0.0.0', which is not loopback, without TLS" in capfd.readouterr().err
    flags += ["--allow-plaintext", "true"]
    with subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        with grpc.insecure_channel(lines[1].split()[-1]) as channel:
            request = health_pb2.HealthCheckRequest(service="ready")
            response = health_pb2_grpc.HealthStub(channel).Check(
                request, timeout=WAIT_S, wait_for_ready=True
            )
        process.terminate()
    assert lines[0].startswith("listening on 0.0.0.0:")
    assert lines[1].startswith("health on 127.0.0.1:")
    assert response.status == health_pb2.HealthCheckResponse.SERVING
    assert "WARNING octavo_server.server: 0.0.0.0 is served in plain" in capfd.readouterr().err


def test_a_killed_server_s_socket_is_taken_over(tmp_path: Path) -> None:
    flags = ["--backend", "reference", "--unix-socket", str(tmp_path / "octavo.sock")]
    for signal_number in (signal.SIGKILL, signal.SIGTERM):
        with server_process(*flags) as (process, _):
            assert process.stdout is not None
            assert process.stdout.readline() == f"listening on unix:{tmp_path}/octavo.sock\n"
            process.send_signal(signal_number)
            process.wait(WAIT_S)
        assert (tmp_path / "octavo.sock").exists() == (signal_number == signal.SIGKILL)


def test_an_address_in_use_is_one_sentence() -> None:
    with server_process("--backend", "reference") as (_, address):
        port = address.rsplit(":", 1)[1]
        flags = ["--backend", "reference", "--port", port, "--model", MODEL]
        command = [sys.executable, "-m", "octavo_server", "serve", *flags]
        second = subprocess.run(
            command, capture_output=True, text=True, timeout=WAIT_S, check=False
        )
    assert second.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in second.stderr
    assert "Traceback" not in second.stderr


def test_a_process_says_where_its_metrics_are_and_logs_in_json() -> None:
    flags = ("--backend", "cpu", "--metrics-address", "127.0.0.1:0", "--log-format", "json")
    with server_process(*flags) as (process, _):
        assert process.stdout is not None
        words = process.stdout.readline().split()
        assert words[:2] == ["metrics", "on"]
        with urllib.request.urlopen(words[2], timeout=WAIT_S) as response:
            assert b"octavo_uptime_seconds" in response.read()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0
        last = json.loads(errors.splitlines()[-1])
        assert (last["level"], last["logger"]) == ("info", "octavo_server.server")
        assert last["message"] == "stopped; everything accepted was finished"


def test_logs_in_json_stay_json_whatever_is_sent_to_the_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    files = Authority(tmp_path).issue(tmp_path / "server")
    tls = ("--tls-cert", str(files.cert), "--tls-key", str(files.key))
    with server_process("--backend", "cpu", "--log-format", "json", *tls) as (process, address):
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=WAIT_S) as scan:
            scan.sendall(b"GET / HTTP/1.1\r\n\r\n")
            while scan.recv(4096):
                pass
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=WAIT_S)
        assert all(isinstance(json.loads(line), dict) for line in errors.splitlines())
