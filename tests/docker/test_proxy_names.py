"""The list of servers for Kubernetes, with a name server in the cluster's place: pods come, go, and move."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest

from tests.docker import sandbox
from tests.docker.haproxy import ROOT, Haproxy, Proxy, running
from tests.docker.name_server import serving_names
from tests.docker.stand_in import SERVING, Place, health_code, health_server
from tests.waiting import wait_until

NAME_SERVER = "127.0.53.53"
ROUTES = [f"client-{number}" for number in range(12)]
NAMES = [f"octavo-{ordinal}" for ordinal in range(4)]

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root may serve names, and give a process its own resolv.conf"
)


@contextmanager
def pod(name: str, host: str) -> Iterator[None]:
    """Run a ready server with the ports that the manifests name."""
    place = Place(host, port=50051, health_port=50052)
    with health_server(name=name, place=place) as (_, servicer):
        servicer.set("ready", SERVING)
        yield


def full_name(pod_name: str) -> str:
    """Return what a pod of the StatefulSet is called in the namespace `here`."""
    return f"{pod_name}.octavo-servers.here.svc.cluster.local"


def names_by_route(proxy: Proxy) -> dict[str, str | None]:
    """Return the pod that each route reaches."""
    return {route: _name_of(proxy, route) for route in ROUTES}


def _name_of(proxy: Proxy, route: str) -> str | None:
    codes = {name: health_code(proxy.address, route, service=name) for name in NAMES}
    return next((name for name, code in codes.items() if code == grpc.StatusCode.OK), None)


def test_pods_keep_their_routes_wherever_they_run(haproxy: Haproxy, tmp_path: Path) -> None:
    if reason := sandbox.why_not():
        pytest.skip(f"this process cannot have its own resolv.conf: {reason}")
    shutil.copy2(ROOT / "docker/kubernetes/base/servers.cfg", tmp_path)
    (tmp_path / "resolv.conf").write_text(f"nameserver {NAME_SERVER}\n")
    script = 'mount --make-rprivate / && mount --bind "$0" /etc/resolv.conf && exec "$@"'
    within = ["unshare", "--mount", "/bin/sh", "-c", script, str(tmp_path / "resolv.conf")]
    with ExitStack() as stack:
        names = stack.enter_context(serving_names(NAME_SERVER))
        first = stack.enter_context(ExitStack())
        first.enter_context(pod("octavo-0", "127.0.53.1"))
        names.addresses[full_name("octavo-0")] = "127.0.53.1"
        variables = {"OCTAVO_NAMESPACE": "here"}
        proxy = stack.enter_context(running(haproxy, tmp_path, variables, within))
        wait_until(lambda: proxy.is_up("octavo-0"))
        assert set(names_by_route(proxy).values()) == {"octavo-0"}

        stack.enter_context(pod("octavo-1", "127.0.53.2"))
        names.addresses[full_name("octavo-1")] = "127.0.53.2"
        wait_until(lambda: proxy.is_up("octavo-1"))
        before = names_by_route(proxy)
        assert set(before.values()) == {"octavo-0", "octavo-1"}

        first.close()
        del names.addresses[full_name("octavo-0")]
        wait_until(lambda: not proxy.is_up("octavo-0"))
        stack.enter_context(pod("octavo-0", "127.0.53.3"))
        names.addresses[full_name("octavo-0")] = "127.0.53.3"
        wait_until(lambda: proxy.is_up("octavo-0"))
        assert names_by_route(proxy) == before
