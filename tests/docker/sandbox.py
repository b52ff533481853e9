"""Runs a program as an image would: another user, no capabilities, a root file system that cannot be written."""

from __future__ import annotations

import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

USER_ID = 10001

NEEDED = tuple({Path(sys.base_prefix), Path(sys.prefix), Path(__file__).parents[2]})
"""What programs of this environment are made of."""

_SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_WRITABLE_PLACES = ("/tmp", "/var", "/home", "/run", "/dev/shm")


def why_not() -> str | None:
    """Return why there can be no sandbox here, None when there can."""
    for program in ("unshare", "setpriv", "mount", "mountpoint"):
        if shutil.which(program, path=_SYSTEM_PATH) is None:
            return f"there is no {program}"
    done = subprocess.run(sandboxed(["/bin/true"]), capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else None


def sandboxed(command: Sequence[str]) -> list[str]:
    """Return a command that runs another one in a sandbox: with the caller's variables, in a mount namespace."""
    script = "\n".join(["set -eu", 'path=$PATH; PATH="$0"', *_mounts(), _enter()])
    unshare = shutil.which("unshare", path=_SYSTEM_PATH) or "unshare"
    return [unshare, "--mount", "/bin/sh", "-c", script, _SYSTEM_PATH, *command]


def run(command: Sequence[str], variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command in a sandbox to its end."""
    return subprocess.run(
        sandboxed(command),
        env=dict(variables),
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def _enter() -> str:
    user = f"--reuid {USER_ID} --regid {USER_ID} --clear-groups"
    rights = "--no-new-privs --bounding-set=-all --inh-caps=-all"
    return f'exec setpriv {user} {rights} env PATH="$path" "$@"'


def _mounts() -> Iterator[str]:
    """Yield shell commands that show every user what is needed, and then make everything read-only."""
    yield "mount --make-rprivate /"
    closed = {path: top for path in NEEDED if (top := _closed_ancestor(path))}
    opened = {path: number for number, path in enumerate(closed, 3)}
    for path, number in opened.items():
        yield f"exec {number}<{shlex.quote(str(path))}"
    for top in set(closed.values()):
        yield f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(top))}"
    for path, number in opened.items():
        quoted = shlex.quote(str(path))
        yield f"mkdir -p {quoted}; mount --no-canonicalize --bind /proc/self/fd/{number} {quoted}; exec {number}<&-"
    for place in ("/", *_WRITABLE_PLACES, *closed, *set(closed.values())):
        quoted = shlex.quote(str(place))
        yield f"! mountpoint -q {quoted} || mount -o remount,bind,ro {quoted}"


def _closed_ancestor(path: Path) -> Path | None:
    """Return the first folder on the way to a path that other users may not pass, such as /root."""
    ways = reversed(path.parents)
    return next((way for way in ways if not way.stat().st_mode & stat.S_IXOTH), None)
