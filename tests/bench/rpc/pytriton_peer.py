"""PyTriton as a peer: its own virtualenv under build/, a server and a client as processes of it.

Where it cannot be installed or does not start, `UnavailableError` says why, and the benchmark goes on without it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tests.bench.bench_library import ROOT
from tests.bench.shapes import LLAMA

VENV = ROOT / "build" / "pytriton-venv"
REQUIREMENT = "nvidia-pytriton==0.7.0"
"""Needs a numpy older than Octavo's tests run with, hence the virtualenv."""

INSTALL_LIMIT_S = 90.0
START_LIMIT_S = 45.0
ANSWER_LIMIT_S = 60.0
STOP_LIMIT_S = 15.0

_TELLING = re.compile(r"^(ERROR: |\S*(Error|Exception)\b|.*: error: ).*", re.IGNORECASE)


class UnavailableError(Exception):
    """PyTriton is not there; the text says why."""


class Program:
    """A module run by the virtualenv's interpreter: a line to its stdin is answered by a line of JSON."""

    def __init__(self, python: Path, module: str, *arguments: str) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._reader = ThreadPoolExecutor(1)
        self._process = subprocess.Popen(
            [python, "-m", f"tests.bench.rpc.{module}", *arguments],
            cwd=ROOT,
            env=environment(os.environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            process_group=0,
        )

    def read(self, limit_s: float) -> dict[str, Any]:
        """Return the next answer.

        Raises:
            UnavailableError: There is none in time.
        """
        try:
            line = self._reader.submit(self._next_answer).result(limit_s)
        except TimeoutError:
            line = ""
        if not line:
            error = last_error(self.stop())
            raise UnavailableError(error or f"no answer in {limit_s:g} s, and no error")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, question: str) -> dict[str, Any]:
        """Send a line and return its answer.

        Raises:
            UnavailableError: There is none in time.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it ended; reading says why
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
        return self.read(ANSWER_LIMIT_S)

    def wait(self) -> None:
        """Wait until the process has ended by itself."""
        self._process.wait()

    def stop(self) -> str:
        """End the process by ending its stdin, then kill what is left of it and of those that it started.

        Returns:
            What it logged; empty the second time.
        """
        if self._log.closed:
            return ""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(subprocess.TimeoutExpired, BrokenPipeError):
            self._process.stdin.close()
            self._process.wait(STOP_LIMIT_S)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.shutdown()
        self._process.stdout.close()
        with self._log as log:
            log.seek(0)
            return log.read().decode(errors="replace")

    def _next_answer(self) -> str:
        """Return the next line of JSON, past what libraries print; empty when the process ended."""
        assert self._process.stdout is not None
        return next((line for line in self._process.stdout if line.startswith("{")), "")


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a program.

    Triton's stub loads libpython by its bare name; without a hint it may find another build's than the virtualenv's.
    """
    found = {name: value for name, value in inherited.items() if name != "PYTHONPATH"}
    folder = sysconfig.get_config_var("LIBDIR") or ""
    if (Path(folder) / str(sysconfig.get_config_var("INSTSONAME"))).is_file():
        paths = [folder, *filter(None, [inherited.get("LD_LIBRARY_PATH")])]
        found["LD_LIBRARY_PATH"] = ":".join(paths)
    return found


def last_error(log: str) -> str:
    """Return the last line of a log that names an error, else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if _TELLING.match(line)]
    return (telling or lines or [""])[-1]


def install(venv: Path = VENV, requirement: str = REQUIREMENT) -> Path:
    """Install PyTriton where that was not done before; return the interpreter.

    Raises:
        UnavailableError: It cannot be installed.
    """
    stamp, python = venv / "installed", venv / "bin" / "python"
    if stamp.is_file() and stamp.read_text() == requirement:
        return python
    _run([sys.executable, "-m", "venv", str(venv)])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "--only-binary", ":all:", requirement])
    stamp.write_text(requirement)
    return python


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=INSTALL_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"not installed in {INSTALL_LIMIT_S:.0f} s") from None
    if done.returncode:
        raise UnavailableError(f"cannot be installed: {last_error(done.stderr or done.stdout)}")


class Peer:
    """A stream to a running PyTriton server."""

    def __init__(self, client: Program) -> None:
        self._client = client

    def latencies_us(self, count: int) -> list[float]:
        """Return the microseconds of calls one after the other."""
        samples: list[float] = self._client.ask(str(count))["us"]
        return samples


@contextmanager
def peer() -> Iterator[Peer]:
    """Run PyTriton's server and a client of it, whose answers were checked.

    Raises:
        UnavailableError: It cannot be installed, or does not start.
    """
    python = install()
    sizes = map(str, (LLAMA.num_q_heads, LLAMA.num_kv_heads, LLAMA.head_dim))
    with ExitStack() as stack:
        server = Program(python, "pytriton_serve")
        stack.callback(server.stop)
        target = f"127.0.0.1:{server.read(START_LIMIT_S)['port']}"
        client = Program(python, "pytriton_call", target, *sizes)
        stack.callback(client.stop)
        yield Peer(client)
