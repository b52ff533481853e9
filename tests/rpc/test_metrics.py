"""Metrics as Prometheus reads them from a real server, and the small HTTP server that they come from."""

from __future__ import annotations

import json
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

import octavo_client as oc
from octavo_server import metrics_server
from octavo_server.backends.base import UnsupportedError
from octavo_server.metrics_server import MAX_CONNECTIONS, MAX_HEAD_BYTES, MetricsServer
from tests.rpc.checked_session import draw_prompt, draw_step
from tests.rpc.conftest import NUM_BLOCKS, serving
from tests.rpc.wire import HEAD_DIM, MODEL, NUM_KV_HEADS, NUM_LAYERS, Wire
from tests.waiting import wait_until

TIMEOUT_S = 30
TOKEN_BYTES = 2 * NUM_KV_HEADS * (HEAD_DIM + 2)
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "telemetry.md"
DOCKER = ROOT / "docker"
DASHBOARD = DOCKER / "grafana" / "dashboards" / "octavo.json"
ALERTS = DOCKER / "prometheus" / "alerts.yml"
UNSHOWN = {
    f"octavo_{name}"
    for name in (
        "launch_batch_size_count",
        "launch_batch_size_sum",
        "launch_kernel_seconds_count",
        "launch_kernel_seconds_sum",
        "step_queue_seconds_count",
        "step_queue_seconds_sum",
    )
}
"""What a histogram has besides its buckets."""


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
        body: bytes = response.read()
        return body.decode()


def samples(text: str) -> dict[tuple[str, ...], Sample]:
    """Return samples by name and the values of their labels, in the order of the labels' names."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture(scope="module")
def served() -> Iterator[Wire]:
    """A server with metrics, after two prompts of 20 tokens, two steps and a refusal."""
    with serving(metrics_address="127.0.0.1:0") as wire, oc.Client(wire.address) as client:
        session = client.open_session(MODEL)
        session.append(*draw_prompt(20))
        for _ in range(2):
            session.decode(0, *draw_step())
        with pytest.raises(oc.PositionMismatch):
            session.decode(0, *draw_step(), start_pos=3)
        yield wire


def test_a_scrape_has_what_the_server_did_and_holds(served: Wire) -> None:
    found = {key: sample.value for key, sample in samples(get(served.server.metrics_url)).items()}
    expected = {
        ("octavo_steps_total",): 5,
        ("octavo_entries_total",): 5,
        ("octavo_step_tokens_total",): 2 * 20 + 3,
        ("octavo_appended_tokens_total",): 2 * 20 + 2,
        ("octavo_launches_total",): 5,
        ("octavo_launch_batch_size_count",): 5,
        ("octavo_launch_batch_size_sum",): 5,
        ("octavo_launch_batch_size_bucket", "1.0"): 5,
        ("octavo_launch_batch_size_bucket", "+Inf"): 5,
        ("octavo_kernel_cache_bytes_total",): (21 + 22 + 2 * 20 + 2) * TOKEN_BYTES,
        ("octavo_sessions",): 1,
        ("octavo_sessions_opened_total",): 1,
        ("octavo_sessions_expired_total",): 0,
        ("octavo_tenant_sessions", ""): 1,
        ("octavo_tenant_tokens", ""): 2 * 16,
        ("octavo_tenant_bytes", ""): 2 * 16 * NUM_LAYERS * TOKEN_BYTES,
        ("octavo_sessions_limit",): 6,
        ("octavo_blocks", MODEL, "held"): 2,
        ("octavo_blocks", MODEL, "free"): NUM_BLOCKS - 2,
        ("octavo_block_bytes", MODEL): 16 * NUM_LAYERS * TOKEN_BYTES,
        ("octavo_device_pool_bytes",): 2 * NUM_BLOCKS * 16 * NUM_LAYERS * TOKEN_BYTES,
        ("octavo_refusals_total", "POSITION_MISMATCH"): 1,
        ("octavo_refusals_total", "DEVICE_FAILURE"): 0,
        ("octavo_queue_depth",): 0,
        ("octavo_streams",): 1,
        ("octavo_streams_limit",): 4,
    }
    assert {key: found[key] for key in expected} == expected
    for stage in ("queue", "copy_in", "kernel"):
        assert found["octavo_stage_seconds_total", stage] > 0
    for name in ("octavo_step_queue_seconds", "octavo_launch_kernel_seconds"):
        assert found[f"{name}_bucket", "+Inf"] == found[f"{name}_count",] == 5
        assert found[f"{name}_bucket", "16.777216"] == 5
        assert found[f"{name}_sum",] > 0
    assert found["octavo_device_free_bytes",] > 2**20
    assert found["octavo_received_bytes_total",] > found["octavo_sent_bytes_total",] > 0
    assert found["process_resident_memory_bytes",] > 2**20


def test_every_metric_has_help_and_type(served: Wire) -> None:
    text = get(served.server.metrics_url)
    families = list(text_string_to_metric_families(text))
    assert len(families) > 30
    for family in families:
        assert family.documentation, family.name
        assert family.type in {"counter", "gauge", "histogram"}, family.name
    (build,) = (family for family in families if family.name == "octavo_build_info")
    assert build.samples[0].labels["backend"] == "cpu"


def test_dashboards_and_alerts_ask_for_metrics_that_are_there(served: Wire) -> None:
    there = {key[0] for key in samples(get(served.server.metrics_url))}
    dashboard = json.loads(DASHBOARD.read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    shown += [variable.get("query", "") for variable in dashboard["templating"]["list"]]
    rules = yaml.safe_load(ALERTS.read_text())["groups"]
    watched = [rule["expr"] for group in rules for rule in group["rules"]]
    assert len(names_in(shown)) > 20
    assert len(names_in(watched)) >= 5
    assert names_in(shown) | names_in(watched) <= there
    # What is there and shown nowhere is not worth a scrape.
    assert {name for name in there if name.startswith("octavo_")} - names_in(shown) <= UNSHOWN


def test_every_metric_is_in_the_docs(served: Wire) -> None:
    documented = DOCS.read_text(encoding="utf-8")
    families = text_string_to_metric_families(get(served.server.metrics_url))
    own = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in families
        if family.name.startswith("octavo_")
    }
    assert {name for name in own if f"`{name}" not in documented} == set()


def names_in(expressions: Iterable[str]) -> set[str]:
    return {name for text in expressions for name in re.findall(r"\b(?:octavo|process)_\w+", text)}


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET /metrics?a=b HTTP/1.0\r\n\r\n", 200),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 200),
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics/../x HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 9\r\n\r\n", 405),
        (b"GET /metrics\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nX: " + MAX_HEAD_BYTES * b"x", 431),
    ],
)
def test_one_request_has_one_answer(served: Wire, request_: bytes, status: int) -> None:
    with connect(served) as connection:
        connection.sendall(request_)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 %d " % status)


def test_a_client_that_hangs_up_gets_nothing(served: Wire) -> None:
    with connect(served) as connection:
        connection.sendall(b"GET /met")
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection).startswith(b"HTTP/1.1 400 ")


def test_silent_clients_give_way(served: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "REQUEST_S", 3600.0)
    silent = [connect(served) for _ in range(MAX_CONNECTIONS + 8)]
    try:
        assert "octavo_steps_total" in get(served.server.metrics_url)
        for first in silent[:8]:
            assert read_all(first) == b""
    finally:
        for connection in silent:
            connection.close()


def test_a_slow_client_is_cut_off(served: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "REQUEST_S", 0.05)
    with connect(served) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert read_all(connection) == b""


def test_answers_are_made_once_for_many_that_ask_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_made = iter(range(100))
    monkeypatch.setattr(metrics_server, "MIN_AGE_S", 3600.0)
    server = MetricsServer("127.0.0.1:0", lambda: b"%d\n" % next(num_made), "text/plain")
    server.start()
    try:
        assert [get(server.url) for _ in range(3)] == ["0\n"] * 3
        monkeypatch.setattr(metrics_server, "MIN_AGE_S", 0.0)
        assert [get(server.url) for _ in range(2)] == ["1\n", "2\n"]
    finally:
        server.close()
    with pytest.raises(urllib.error.URLError):
        get(server.url)


def test_a_defect_ends_one_request_alone(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> bytes:
        raise ValueError("a defect")

    server = MetricsServer("[::1]:0", fail, "text/plain")
    server.start()
    try:
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            get(server.url)
        assert "200 OK" in get(server.url.replace("metrics", "healthz"))
    finally:
        server.close()
    wait_until(lambda: "could not be answered" in caplog.text)


def test_an_address_in_use_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UnsupportedError, match=f"cannot listen on metrics_address {address}"):
            MetricsServer(address, bytes, "text/plain")


def test_metrics_end_with_the_server() -> None:
    with serving(metrics_address="127.0.0.1:0") as wire:
        url = wire.server.metrics_url
        get(url)
    with pytest.raises(urllib.error.URLError):
        get(url)


def connect(wire: Wire) -> socket.socket:
    port = int(wire.server.metrics_url.rpartition(":")[2].partition("/")[0])
    return socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)


def read_all(connection: socket.socket) -> bytes:
    """Return what comes until the other end closes, however it does."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received
