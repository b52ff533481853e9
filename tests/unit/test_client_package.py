"""The package as its users see it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from types import ModuleType

import pytest

import octavo_client as oc
from octavo_client import _errors
from octavo_client._channel import channel_options


def test_all_is_complete_and_nothing_else_is_public() -> None:
    public = {
        name
        for name, value in vars(oc).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public == set(oc.__all__)


def test_every_exception_is_exported() -> None:
    exceptions = {
        name
        for name, value in vars(_errors).items()
        if isinstance(value, type) and issubclass(value, oc.OctavoError) and name[0] != "_"
    }
    assert exceptions <= set(oc.__all__)


@pytest.mark.parametrize(
    ("blocking", "awaiting"), [(oc.Client, oc.AsyncClient), (oc.Session, oc.AsyncSession)]
)
def test_the_two_clients_have_the_same_methods(blocking: type, awaiting: type) -> None:
    def methods(kind: type) -> dict[str, list[tuple[str, object]]]:
        return {
            name: [(p.name, p.default) for p in inspect.signature(value).parameters.values()]
            for name, value in vars(kind).items()
            if not name.startswith("_") and inspect.isfunction(value)
        }

    assert methods(blocking) == methods(awaiting)
    assert all(inspect.getdoc(vars(awaiting)[name]) for name in methods(awaiting))


def test_importing_is_quick_and_light() -> None:
    script = (
        "import sys, time, resource; start = time.process_time(); import octavo_client;"
        "print(time.process_time() - start);"
        "print(*{'torch', 'rich', 'safetensors', 'octavo_server'} & set(sys.modules))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    seconds, heavy = zip(*(run.stdout.split("\n")[:2] for run in runs), strict=True)
    assert min(map(float, seconds)) < 0.5
    assert heavy == ("", "")


@pytest.mark.parametrize("field", ["connect_s", "call_s", "step_s", "append_s"])
@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_every_wait_is_bounded(field: str, seconds: float) -> None:
    with pytest.raises(ValueError, match=field):
        oc.Timeout(**{field: seconds})


def test_a_wait_is_a_number() -> None:
    with pytest.raises(TypeError, match="step_s must be a number of seconds, got '3'"):
        oc.Timeout(step_s="3")  # type: ignore[arg-type]


def test_a_silent_link_is_noticed_while_a_step_can_still_be_sent_again() -> None:
    options = dict(channel_options(oc.Timeout(), oc.Retry()))
    noticed_ms = options["grpc.keepalive_time_ms"] + options["grpc.keepalive_timeout_ms"]
    assert noticed_ms <= oc.Timeout().step_s * 1000 / 2


def test_long_waits_fit_the_channels_options() -> None:
    longest = oc.Retry(initial_backoff_s=1e9, max_backoff_s=1e300)
    options = dict(channel_options(oc.Timeout(connect_s=1e300), longest))
    assert options["grpc.min_reconnect_backoff_ms"] == 2**31 - 1
    assert options["grpc.initial_reconnect_backoff_ms"] == 2**31 - 1
    assert options["grpc.max_reconnect_backoff_ms"] == 2**31 - 1


def test_retry_is_checked() -> None:
    with pytest.raises(ValueError, match="max_attempts"):
        oc.Retry(max_attempts=0)
    with pytest.raises(ValueError, match="initial_backoff_s"):
        oc.Retry(initial_backoff_s=2.0, max_backoff_s=1.0)
