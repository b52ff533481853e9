"""The wire contract: generated code is current, v1 only gains, everything is commented."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
)

from octavo import v1

ROOT = Path(__file__).parents[2]
PROTO_DIR = ROOT / "proto" / "octavo" / "v1"
BASELINE = Path(__file__).parent / "data" / "octavo_v1.binpb"
GENERATED = ("octavo_pb2.py", "octavo_pb2.pyi", "octavo_pb2_grpc.py")


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "proto" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_code_is_current(tmp_path: Path) -> None:
    script = ROOT / "proto" / "generate.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True)
    for name in GENERATED:
        generated = (tmp_path / "octavo" / "v1" / name).read_text(encoding="utf-8")
        committed = (PROTO_DIR / name).read_text(encoding="utf-8")
        assert generated == committed, f"{name} is stale; run `make proto`"


def test_v1_only_gains() -> None:
    baseline = FileDescriptorSet.FromString(BASELINE.read_bytes()).file[0]
    assert baseline.package == "octavo.v1"
    assert losses(facts_of(baseline), facts_of(current_file())) == []


def current_file() -> FileDescriptorProto:
    """Return the descriptor of the code that clients and server run."""
    file = FileDescriptorProto()
    v1.DESCRIPTOR.CopyToProto(file)
    return file


def facts_of(file: FileDescriptorProto) -> dict[str, str]:
    """Return all that a peer built against `file` relies on: names and what each stands for."""
    facts = {f"package {file.package}": file.syntax}
    facts |= dict(_enum_facts(file.package, file.enum_type))
    for message in file.message_type:
        facts |= dict(_message_facts(file.package, message))
    for service in file.service:
        facts[f"service {file.package}.{service.name}"] = ""
        for method in service.method:
            facts[f"rpc {file.package}.{service.name}.{method.name}"] = _call_of(method)
    return facts


def losses(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """List the facts that are gone or changed; gains are none."""
    return [
        f"{name}: was {fact or 'there'}, is {after.get(name, 'gone')}"
        for name, fact in before.items()
        if after.get(name) != fact
    ]


def _message_facts(scope: str, message: DescriptorProto) -> Iterator[tuple[str, str]]:
    name = f"{scope}.{message.name}"
    yield f"message {name}", ""
    for field in message.field:
        yield f"field {name}.{field.name}", _field_fact(message, field)
    yield from _enum_facts(name, message.enum_type)
    for nested in message.nested_type:
        yield from _message_facts(name, nested)


def _enum_facts(scope: str, enums: Iterable[EnumDescriptorProto]) -> Iterator[tuple[str, str]]:
    for enum in enums:
        yield f"enum {scope}.{enum.name}", ""
        for value in enum.value:
            yield f"value {scope}.{enum.name}.{value.name}", str(value.number)


def _field_fact(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    label = FieldDescriptorProto.Label.Name(field.label)
    kind = field.type_name or FieldDescriptorProto.Type.Name(field.type)
    choice = ""
    if field.HasField("oneof_index"):
        choice = f" of {message.oneof_decl[field.oneof_index].name}"
    presence = " with presence" if field.proto3_optional else ""
    packing = " unpacked" if field.options.HasField("packed") and not field.options.packed else ""
    return f"{label} {kind} = {field.number}{choice}{presence}{packing}"


def _call_of(method: MethodDescriptorProto) -> str:
    request = "stream " * method.client_streaming + method.input_type
    response = "stream " * method.server_streaming + method.output_type
    return f"({request}) returns ({response})"


def _message(file: FileDescriptorProto, name: str) -> DescriptorProto:
    return next(message for message in file.message_type if message.name == name)


def test_removed_message_is_a_loss() -> None:
    file = current_file()
    del file.message_type[[message.name for message in file.message_type].index("Tensor")]
    assert "message octavo.v1.Tensor: was there, is gone" in _losses_of(file)


def test_removed_field_is_a_loss() -> None:
    file = current_file()
    del _message(file, "Tensor").field[0]
    assert _losses_of(file) == [
        "field octavo.v1.Tensor.data: was LABEL_OPTIONAL TYPE_BYTES = 1, is gone"
    ]


def test_renamed_field_is_a_loss() -> None:
    file = current_file()
    _message(file, "Tensor").field[0].name = "bytes"
    (loss,) = _losses_of(file)
    assert loss.startswith("field octavo.v1.Tensor.data")


def test_renumbered_field_is_a_loss() -> None:
    file = current_file()
    _message(file, "Tensor").field[0].number = 9
    (loss,) = _losses_of(file)
    assert loss.endswith("is LABEL_OPTIONAL TYPE_BYTES = 9")


def test_retyped_field_is_a_loss() -> None:
    file = current_file()
    _message(file, "Tensor").field[0].type = FieldDescriptorProto.TYPE_STRING
    (loss,) = _losses_of(file)
    assert loss.endswith("is LABEL_OPTIONAL TYPE_STRING = 1")


def test_field_of_another_message_type_is_a_loss() -> None:
    file = current_file()
    step = _message(file, "Step")
    next(field for field in step.field if field.name == "q").type_name = ".octavo.v1.Session"
    (loss,) = _losses_of(file)
    assert loss.endswith("is LABEL_OPTIONAL .octavo.v1.Session = 7")


def test_relabelled_field_is_a_loss() -> None:
    file = current_file()
    _message(file, "Tensor").field[2].label = FieldDescriptorProto.LABEL_OPTIONAL
    (loss,) = _losses_of(file)
    assert loss.startswith("field octavo.v1.Tensor.shape: was LABEL_REPEATED")


def test_field_without_its_presence_is_a_loss() -> None:
    file = current_file()
    step = _message(file, "Step")
    causal = next(field for field in step.field if field.name == "causal")
    causal.ClearField("proto3_optional")
    causal.ClearField("oneof_index")
    (loss,) = _losses_of(file)
    assert loss.startswith("field octavo.v1.Step.causal")


def test_changed_enum_is_a_loss() -> None:
    file = current_file()
    file.enum_type[0].value[1].number = 7
    del file.enum_type[0].value[2]
    assert _losses_of(file) == [
        "value octavo.v1.DataType.DATA_TYPE_FLOAT16: was 1, is 7",
        "value octavo.v1.DataType.DATA_TYPE_BFLOAT16: was 2, is gone",
    ]


def test_changed_call_is_a_loss() -> None:
    file = current_file()
    methods = {method.name: method for method in file.service[0].method}
    methods["Decode"].server_streaming = False
    methods["Append"].output_type = ".octavo.v1.GetSessionResponse"
    decode = next(loss for loss in _losses_of(file) if "Decode" in loss)
    assert decode.endswith(
        "is (stream .octavo.v1.DecodeRequest) returns (.octavo.v1.DecodeResponse)"
    )
    assert len(_losses_of(file)) == 2


def test_removed_call_is_a_loss() -> None:
    file = current_file()
    del file.service[0].method[0]
    (loss,) = _losses_of(file)
    assert loss.startswith("rpc octavo.v1.OctavoService.ServerInfo")
    assert loss.endswith("is gone")


def test_gains_are_no_loss() -> None:
    file = current_file()
    file.message_type.add(name="Added").field.add(name="new", number=1)
    _message(file, "Tensor").field.add(name="more", number=99)
    file.enum_type[0].value.add(name="DATA_TYPE_MORE", number=99)
    file.service[0].method.add(name="More")
    assert _losses_of(file) == []


def _losses_of(changed: FileDescriptorProto) -> list[str]:
    return losses(facts_of(current_file()), facts_of(changed))


# Where descriptor.proto keeps the parts of a file, of a message, and of an enum or service.
MESSAGES, ENUMS, SERVICES, PARTS = 4, 5, 6, 2


def test_everything_is_commented(generator: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "octavo.binpb"
    generator.write_descriptor(target)
    file = FileDescriptorSet.FromString(target.read_bytes()).file[-1]
    assert file.name == "octavo/v1/octavo.proto"
    assert bare_parts(file) == []


def bare_parts(file: FileDescriptorProto) -> list[str]:
    """List messages, fields, enums, values, services and calls without a comment of their own."""
    commented = {
        tuple(location.path)
        for location in file.source_code_info.location
        if location.leading_comments or location.trailing_comments
    }
    return [name for path, name in _commentable(file) if path not in commented]


def _commentable(file: FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    for idx, message in enumerate(file.message_type):
        yield (MESSAGES, idx), message.name
        for field_idx, field in enumerate(message.field):
            yield (MESSAGES, idx, PARTS, field_idx), f"{message.name}.{field.name}"
    for idx, enum in enumerate(file.enum_type):
        yield (ENUMS, idx), enum.name
        for value_idx, value in enumerate(enum.value):
            yield (ENUMS, idx, PARTS, value_idx), f"{enum.name}.{value.name}"
    for idx, service in enumerate(file.service):
        yield (SERVICES, idx), service.name
        for method_idx, method in enumerate(service.method):
            yield (SERVICES, idx, PARTS, method_idx), f"{service.name}.{method.name}"


def test_missing_comments_are_found() -> None:
    file = FileDescriptorProto()
    file.message_type.add(name="A").field.add(name="b")
    file.enum_type.add(name="E").value.add(name="E_X")
    file.service.add(name="S").method.add(name="M")
    file.source_code_info.location.add(path=[MESSAGES, 0], leading_comments="An A.")
    file.source_code_info.location.add(path=[SERVICES, 0, PARTS, 0], trailing_comments="Does M.")
    assert bare_parts(file) == ["A.b", "E", "E.E_X", "S"]
