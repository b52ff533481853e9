"""The files of docker/ against the linters and schemas of their formats, and against each other."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from octavo_server.config import load_config
from octavo_server.config_keys import ServerConfig
from octavo_server.server import STREAM_END_S
from tests.docker.haproxy import CONFIG, Haproxy
from tests.docker.sandbox import USER_ID

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
STEPS = sorted((DOCKER / "steps").glob("*.sh"))
OVERLAYS = ["base", "overlays/cuda", "overlays/plain"]
KUBERNETES_VERSION = "1.33"
DISK_BYTES_PER_S = 50e6
"""A slow volume's, for the time that snapshots take."""

SERVER_LINE = re.compile(
    r'^    server octavo-(\d+) "octavo-(\d+)\.octavo-servers\.\$\{OCTAVO_NAMESPACE\}\.svc\.cluster\.local'
    r':50051" id (\d+)$',
    re.MULTILINE,
)

Document = dict[str, Any]


def bin_of(program: str) -> str:
    """Return the path of a program of this environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(program, path=path)
    assert found, f'{program} is not installed; pip install ".[dev]"'
    return found


def run(*command: str, text: str | None = None) -> str:
    """Run a program that must succeed; return what it printed."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_hadolint_finds_nothing() -> None:
    run(bin_of("hadolint"), str(DOCKER / "Dockerfile"))


def test_hadolint_is_alive() -> None:
    done = subprocess.run(
        [bin_of("hadolint"), "-"],
        input="FROM debian\nRUN cd /x\n",
        text=True,
        check=False,
        stdout=subprocess.PIPE,
    )
    assert done.returncode != 0
    assert "DL3006" in done.stdout


def test_shellcheck_finds_nothing() -> None:
    assert STEPS
    run(bin_of("shellcheck"), *map(str, STEPS))


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_every_step_is_a_program_of_the_dockerfile(step: Path) -> None:
    assert step.stat().st_mode & stat.S_IXUSR
    assert f"steps/{step.name}" in DOCKERFILE


def test_the_dockerfile_runs_nothing_but_steps() -> None:
    joined = DOCKERFILE.replace("\\\n", " ")
    commands = re.findall(r"^RUN (?:--mount=\S+ )?(.*)$", joined, re.MULTILINE)
    for command in (part.strip() for line in commands for part in line.split("&&")):
        assert re.fullmatch(r"(docker|)/?steps/[a-z-]+\.sh( [a-z,-]+)*", command), command


def test_images_have_the_user_of_the_step() -> None:
    assert f"USER {USER_ID}:{USER_ID}" in DOCKERFILE
    assert f"id={USER_ID}" in (DOCKER / "steps" / "add-user.sh").read_text(encoding="utf-8")


def test_images_are_of_the_project_s_version() -> None:
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    assert COMPOSE["services"]["server"]["image"] == f"octavo-server:{version[1]}-cpu"
    assert COMPOSE["services"]["load"]["image"] == f"octavo-load:{version[1]}"
    tags = [
        image["newTag"]
        for name in ("base", "overlays/cuda")
        for image in read(DOCKER / "kubernetes" / name / "kustomization.yaml")["images"]
        if image["name"] == "octavo-server"
    ]
    assert tags == [f"{version[1]}-cpu", f"{version[1]}-cuda"]


def test_compose_is_valid() -> None:
    schema = ["--builtin-schema", "vendor.compose-spec"]
    run(bin_of("check-jsonschema"), *schema, str(DOCKER / "compose.yaml"))


def test_docker_takes_the_compose_file() -> None:
    has_plugin = (
        shutil.which("docker")
        and not subprocess.run(
            ["docker", "compose", "version"], capture_output=True, check=False
        ).returncode
    )
    if not has_plugin:
        pytest.skip("there is no docker with its compose plugin")
    run("docker", "compose", "--file", str(DOCKER / "compose.yaml"), "--profile", "load", "config")


@pytest.mark.parametrize("name", sorted(COMPOSE["services"]))
def test_services_are_hardened_and_pinned(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert re.search(r":v?\d+\.\d+\.\d+(-\w+)?$", service["image"])
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:"), "published to this machine alone"
    for volume in service.get("volumes", []):
        if volume.startswith("./"):
            assert (DOCKER / volume.split(":")[0]).exists()


def test_compose_s_parts_agree() -> None:
    config = load_config(DOCKER / "octavo.yaml")
    server = COMPOSE["services"]["server"]
    assert server["ports"] == [f"127.0.0.1:{config.port}:{config.port}"]
    assert server["healthcheck"]["test"][-1] == f"127.0.0.1:{port_of(config.health_address)}"
    assert f'"--target", "127.0.0.1:{port_of(config.health_address)}"' in DOCKERFILE
    assert "snapshots:/var/lib/octavo" in server["volumes"]
    assert config.snapshot_dir.startswith("/var/lib/octavo/")
    scraped = read(DOCKER / "prometheus" / "prometheus.yml")["scrape_configs"]
    targets = [
        target for job in scraped for part in job["static_configs"] for target in part["targets"]
    ]
    assert targets == [f"server:{port_of(config.metrics_address)}"]
    grace_s = server["stop_grace_period"].removesuffix("s")
    assert int(grace_s) >= stop_seconds(config)


def test_the_image_exposes_the_ports() -> None:
    config = load_config(DOCKER / "octavo.yaml")
    ports = [config.port, port_of(config.health_address), port_of(config.metrics_address)]
    assert f"EXPOSE {' '.join(map(str, ports))}\n" in DOCKERFILE


def test_grafana_finds_its_files() -> None:
    grafana = COMPOSE["services"]["grafana"]
    (provider,) = read(DOCKER / "grafana/provisioning/dashboards/octavo.yaml")["providers"]
    folder = provider["options"]["path"]
    assert f"./grafana/dashboards:{folder}:ro" in grafana["volumes"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{folder}/octavo.json"
    (source,) = read(DOCKER / "grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    port = COMPOSE["services"]["prometheus"]["ports"][0].split(":")[-1]
    assert source["url"] == f"http://prometheus:{port}"


def test_dashboards_use_the_source_that_is_there() -> None:
    (source,) = read(DOCKER / "grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    dashboard = json.loads((DOCKER / "grafana/dashboards/octavo.json").read_text(encoding="utf-8"))
    used = {found for found in uids_in(dashboard) if not found.startswith("$")}
    assert used <= {source["uid"], "-- Grafana --"}


def uids_in(node: Any) -> Iterator[str]:
    """Yield the uid of every data source that a dashboard names."""
    if isinstance(node, list):
        for item in node:
            yield from uids_in(item)
    elif isinstance(node, dict):
        source = node.get("datasource")
        if isinstance(source, dict) and source.get("uid"):
            yield source["uid"]
        for value in node.values():
            yield from uids_in(value)


def port_of(address: str) -> int:
    """Return the port of HOST:PORT."""
    return int(address.rpartition(":")[2])


def stop_seconds(config: ServerConfig) -> float:
    """Return how long a server may take to stop: its work, its streams, and a full pool as snapshots."""
    pools = [model.memory.bytes or 0 for model in config.models if model.memory]
    return config.drain_timeout_s + STREAM_END_S + sum(pools) / DISK_BYTES_PER_S


def read(path: Path) -> Document:
    """Read a YAML file of one document."""
    document: Document = yaml.safe_load(path.read_text(encoding="utf-8"))
    return document


@pytest.fixture(scope="module", params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> str:
    """What kustomize makes of a folder."""
    folder = str(DOCKER / "kubernetes" / request.param)
    if kustomize := shutil.which("kustomize"):
        return run(kustomize, "build", folder)
    if kubectl := shutil.which("kubectl"):
        return run(kubectl, "kustomize", folder)
    pytest.skip("there is no kustomize and no kubectl")


def by_kind(text: str) -> dict[tuple[str, str], Document]:
    """Return manifests by (kind, name)."""
    documents = [document for document in yaml.safe_load_all(text) if document]
    return {(each["kind"], each["metadata"]["name"]): each for each in documents}


def validate(path: Path) -> None:
    """Check manifests against Kubernetes' own schemas."""
    program = [
        bin_of("kubernetes-validate"),
        "--strict",
        "--kubernetes-version",
        KUBERNETES_VERSION,
    ]
    run(*program, str(path))


def test_manifests_are_valid(manifests: str, tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(manifests)
    validate(tmp_path / "all.yaml")


@pytest.mark.parametrize("name", ["servers.yaml", "proxy.yaml"])
def test_manifests_are_valid_as_they_are_written(name: str) -> None:
    """Where there is no kustomize, too."""
    validate(DOCKER / "kubernetes" / "base" / name)


def pods(manifests: str) -> list[Document]:
    """Return the pod templates."""
    found = [
        document["spec"]["template"]["spec"]
        for document in by_kind(manifests).values()
        if document["kind"] in ("StatefulSet", "Deployment")
    ]
    assert len(found) == 2
    return found


def test_pods_are_hardened(manifests: str) -> None:
    for pod in pods(manifests):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert re.search(r":\d+\.\d+\.\d+-\w+$", container["image"])
            assert "memory" in container["resources"]["limits"]
            assert "readinessProbe" in container
            mounted = {mount["name"] for mount in container["volumeMounts"]} - {"snapshots"}
            assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_statefulset_runs_the_server(manifests: str, tmp_path: Path) -> None:
    """Its arguments and its config are ones that the server takes, and its probes ask where that answers."""
    found = by_kind(manifests)
    pod = found["StatefulSet", "octavo"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == USER_ID
    (container,) = pod["containers"]
    command, config_flag, *flags = container["args"]
    assert (command, config_flag) == ("serve", "--config=/etc/octavo/config/octavo.yaml")
    (text,) = [
        document["data"]["octavo.yaml"]
        for (kind, name), document in found.items()
        if kind == "ConfigMap" and name.startswith("octavo-config")
    ]
    (tmp_path / "octavo.yaml").write_text(text)
    pairs = [flag.removeprefix("--").split("=", 1) for flag in flags]
    config = load_config(
        tmp_path / "octavo.yaml", {key.replace("-", "_"): value for key, value in pairs}
    )
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {
        "grpc": config.port,
        "health": port_of(config.health_address),
        "metrics": port_of(config.metrics_address),
    }
    for name, service in (("startup", "live"), ("liveness", "live"), ("readiness", "ready")):
        assert container[f"{name}Probe"]["grpc"] == {"port": ports["health"], "service": service}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert config.snapshot_dir.startswith(f"{mounts['snapshots']}/")
    assert pod["terminationGracePeriodSeconds"] >= stop_seconds(config)
    for path in (config.tls_cert, config.tls_key, config.tenants):
        assert not path or str(Path(path).parent) in mounts.values()
    assert bool(config.tls_cert) == bool(config.tenants) == (not config.allow_plaintext)


def test_services_lead_to_pods(manifests: str) -> None:
    found = by_kind(manifests)
    for (kind, name), document in found.items():
        if kind == "Service":
            owners = [
                owner
                for owner in found.values()
                if owner["kind"] in ("StatefulSet", "Deployment")
                and document["spec"]["selector"].items()
                <= owner["spec"]["template"]["metadata"]["labels"].items()
            ]
            assert len(owners) == 1, name
            (container,) = owners[0]["spec"]["template"]["spec"]["containers"]
            names = {port["name"] for port in container["ports"]}
            assert {port["targetPort"] for port in document["spec"]["ports"]} <= names
    assert found["StatefulSet", "octavo"]["spec"]["serviceName"] == "octavo-servers"


def test_the_proxy_knows_the_servers(manifests: str, haproxy: Haproxy, tmp_path: Path) -> None:
    """HAProxy takes both files with the variables of the Deployment; a place on the ring is an ordinal's for ever."""
    found = by_kind(manifests)
    configs = []
    for (kind, name), document in found.items():
        if kind == "ConfigMap" and not name.startswith("octavo-config"):
            for file, text in document["data"].items():
                configs.append(tmp_path / file)
                configs[-1].write_text(text)
    assert sorted(path.name for path in configs) == ["haproxy.cfg", "servers.cfg"]
    (container,) = found["Deployment", "octavo-proxy"]["spec"]["template"]["spec"]["containers"]
    # The certificates are in a secret; that they work is tested in test_proxy.
    variables = {each["name"]: each.get("value", "default") for each in container["env"]}
    given = {name: value for name, value in variables.items() if not value.startswith("/etc")}
    assert haproxy.check(sorted(configs), given) == ""
    servers = SERVER_LINE.findall((tmp_path / "servers.cfg").read_text())
    assert servers == [(f"{idx}", f"{idx}", f"{idx + 1}") for idx in range(len(servers))]
    assert found["StatefulSet", "octavo"]["spec"]["replicas"] <= len(servers)
    for name, value in variables.items():
        assert name == "OCTAVO_NAMESPACE" or name in CONFIG.read_text(encoding="utf-8"), (
            name,
            value,
        )


def test_no_secret_is_in_a_file(manifests: str) -> None:
    assert "Secret" not in {kind for kind, _ in by_kind(manifests)}


def test_haproxy_takes_the_example(haproxy: Haproxy) -> None:
    assert haproxy.check([CONFIG, CONFIG.with_name("servers.cfg")], {}) == ""


def test_haproxy_s_check_is_alive(haproxy: Haproxy, tmp_path: Path) -> None:
    (tmp_path / "servers.cfg").write_text("backend octavo from octavo\n    balance nonsense\n")
    assert "[ALERT]" in haproxy.check([CONFIG, tmp_path / "servers.cfg"], {})
