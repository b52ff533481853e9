"""The layers: each module imports only downward, and the pure core stays pure."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVER_ROOT = ROOT / "server" / "octavo_server"
CLIENT_ROOT = ROOT / "client" / "octavo_client"

WORK = frozenset({"work", "work_lanes", "work_order"})

FILES = frozenset({"session_file", "session_header"})

LAYERS: tuple[frozenset[str], ...] = (
    frozenset(
        {
            "config",
            "config_keys",
            "config_rules",
            "config_section",
            "config_schema",
            "config_source",
            "errors",
            "logs",
            "model",
            "tenants_file",
            "tokens",
            "version",
        }
    ),
    frozenset(
        {"block_pool", "leases", "scheduler", "session", "session_store", "stats", "tenant"}
        | WORK
        | FILES
    ),
    frozenset({"backends", "cuda_build", "kernel_build", "step", "launch", "model_pool"}),
    frozenset({"engine", "queued", "session_transfer", "sessions", "snapshots"}),
    frozenset(
        {
            "auth",
            "calls",
            "codec",
            "grpc_server",
            "metrics",
            "metrics_server",
            "step_log",
            "step_watch",
            "tracing",
            "health_check",
            "request_reader",
            "service",
            "shared_memory",
            "status",
            "step_stream",
            "stream_call",
            "tls",
            "traffic",
            "transfer_calls",
            "unix_socket",
        }
    ),
    frozenset({"server"}),
    frozenset({"status_command", "status_view"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
"""Modules of octavo_server from the bottom up; one imports its own layer and those below."""

WIRE = frozenset({"grpc", "grpc_status", "grpc_health", "grpc_reflection", "google", "octavo"})
PURE_CORE = (
    frozenset(
        {
            "block_pool",
            "leases",
            "scheduler",
            "session",
            "session_store",
            "stats",
            "tenant",
            "errors",
        }
    )
    | WORK
    | FILES
)
NOT_IN_PURE_CORE = WIRE | {"torch", "time", "datetime"}
NOT_IN_ENGINE = WIRE | {"torch"}
USE_THE_CLIENT = frozenset({"status_command", "status_view"})
"""Modules of octavo_server that are a client of one themselves."""


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module, with where it stands."""

    target: str
    line: int
    is_at_module_level: bool


@dataclass(frozen=True, slots=True)
class Module:
    """A module by its dotted name, with all its imports, those inside functions too."""

    name: str
    imports: tuple[Import, ...] = field(default=())


def parse(name: str, source: str, *, is_package: bool = False) -> Module:
    """Read the imports of a module's source."""
    tree = ast.parse(source)
    package = name if is_package else name.rpartition(".")[0]
    inner = {id(node) for node in _inside_functions(tree)}
    imports = [
        Import(target, node.lineno, id(node) not in inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for target in _targets(node, package)
    ]
    return Module(name, tuple(imports))


def _inside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from ast.walk(node)


def _targets(node: ast.Import | ast.ImportFrom, package: str) -> Iterator[str]:
    """Yield what an import names; `from a import b` may name the module a.b, so that is what counts."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    else:
        above = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
        yield from (f"{base}.{alias.name}" for alias in node.names)


def read_package(root: Path) -> list[Module]:
    """Read every module of a package."""
    modules = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        modules.append(parse(name, path.read_text(encoding="utf-8"), is_package=is_package))
    return modules


def level_of(name: str) -> int | None:
    """Return the layer of a module of octavo_server, None when the table has none for it."""
    part = f"{name}..".split(".")[1]
    return next((level for level, names in enumerate(LAYERS) if part in names), None)


def upward_imports(modules: list[Module]) -> list[str]:
    """List imports of octavo_server that go up, and modules that no layer has."""
    faults = []
    for module in modules:
        level = level_of(module.name)
        if level is None:
            faults += [] if module.name == "octavo_server" else [f"{module.name} is in no layer"]
            continue
        for imported in module.imports:
            target = level_of(imported.target) if _is_of(imported, "octavo_server") else None
            if target is not None and target > level:
                faults.append(f"{module.name}:{imported.line} imports {imported.target}")
    return faults


def foreign_imports(modules: list[Module], banned: Mapping[str, frozenset[str]]) -> list[str]:
    """List imports that `banned` forbids, by module of octavo_server."""
    return [
        f"{module.name}:{imported.line} imports {imported.target}"
        for module in modules
        for imported in module.imports
        if imported.target.split(".")[0] in banned.get(module.name.partition(".")[2], frozenset())
    ]


def client_faults(modules: list[Module]) -> list[str]:
    """List imports of the server anywhere, and of torch where importing the client would load it."""
    return [
        f"{module.name}:{imported.line} imports {imported.target}"
        for module in modules
        for imported in module.imports
        if _is_of(imported, "octavo_server")
        or (imported.is_at_module_level and _is_of(imported, "torch"))
    ]


def _is_of(imported: Import, package: str) -> bool:
    return imported.target.split(".")[0] == package


BANNED = dict.fromkeys(PURE_CORE, NOT_IN_PURE_CORE) | dict.fromkeys(
    ("engine", "launch", "step"), NOT_IN_ENGINE
)


def test_server_imports_only_downward() -> None:
    assert upward_imports(read_package(SERVER_ROOT)) == []


def test_every_layer_exists() -> None:
    modules = {
        module.name.partition(".")[2].partition(".")[0] for module in read_package(SERVER_ROOT)
    }
    assert frozenset.union(*LAYERS) <= modules


def test_pure_core_and_engine_know_no_wire_and_no_torch() -> None:
    assert foreign_imports(read_package(SERVER_ROOT), BANNED) == []


def test_the_server_knows_no_client_but_where_it_is_one() -> None:
    users = {
        module.name.partition(".")[2]
        for module in read_package(SERVER_ROOT)
        if any(_is_of(imported, "octavo_client") for imported in module.imports)
    }
    assert users == USE_THE_CLIENT


def test_client_knows_no_server_and_loads_no_torch() -> None:
    modules = read_package(CLIENT_ROOT)
    assert "octavo_client" in {module.name for module in modules}
    assert client_faults(modules) == []


@pytest.mark.parametrize(
    "source",
    [
        "from octavo_server.engine import Engine",
        "from octavo_server import engine",
        "import octavo_server.engine",
        "from . import engine",
        "from .engine import Engine",
        "def late():\n    from octavo_server.engine import Engine",
        "class A:\n    import octavo_server.engine",
        "if True:\n    from octavo_server import engine",
    ],
)
def test_planted_upward_import_is_found(source: str) -> None:
    (fault,) = upward_imports([parse("octavo_server.session", source)])
    assert fault.startswith("octavo_server.session:")


def test_planted_upward_import_in_a_subpackage_is_found() -> None:
    (fault,) = upward_imports([parse("octavo_server.backends.cpu", "from ..engine import Engine")])
    assert fault.endswith("imports octavo_server.engine.Engine")
    assert upward_imports([parse("octavo_server.backends.cpu", "from .base import Backend")]) == []


def test_module_without_a_layer_is_found() -> None:
    assert upward_imports([parse("octavo_server.new", "")]) == ["octavo_server.new is in no layer"]


def test_planted_foreign_imports_are_found() -> None:
    source = "import time\nimport numpy\ndef late():\n    import torch.nn"
    assert foreign_imports([parse("octavo_server.scheduler", source)], BANNED) == [
        "octavo_server.scheduler:1 imports time",
        "octavo_server.scheduler:4 imports torch.nn",
    ]
    assert foreign_imports([parse("octavo_server.engine", source)], BANNED) == [
        "octavo_server.engine:4 imports torch.nn"
    ]


def test_planted_client_faults_are_found() -> None:
    source = "import torch\ndef late():\n    import torch\n    from octavo_server import errors"
    assert client_faults([parse("octavo_client._wire", source)]) == [
        "octavo_client._wire:1 imports torch",
        "octavo_client._wire:4 imports octavo_server.errors",
    ]
