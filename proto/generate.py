"""Generate the Python code of octavo.proto: `python proto/generate.py [target folder]`."""

from __future__ import annotations

import sys
from pathlib import Path

import google.rpc
from grpc_tools import protoc

PROTO_ROOT = Path(__file__).parent
PROTO_FILE = "octavo/v1/octavo.proto"


def generate(target: Path) -> None:
    """Write octavo_pb2.py, octavo_pb2.pyi and octavo_pb2_grpc.py below `target`/octavo/v1.

    Raises:
        RuntimeError: protoc refused the file; it has said why on stderr.
    """
    run_protoc(f"--python_out={target}", f"--pyi_out={target}", f"--grpc_python_out={target}")


def write_descriptor(target: Path) -> None:
    """Write the file's descriptor, with its comments and without what it imports, to `target`."""
    run_protoc(f"--descriptor_set_out={target}", "--include_source_info")


def run_protoc(*outputs: str) -> None:
    """Run protoc on octavo.proto with the arguments that say what to write."""
    # google/rpc/status.proto lies beside the code of googleapis-common-protos.
    google_root = Path(google.rpc.__path__[0]).parents[1]
    # The protos of protobuf itself (any.proto) lie inside grpc_tools.
    builtin_root = Path(protoc.__file__).parent / "_proto"
    roots = [f"-I{root}" for root in (PROTO_ROOT, google_root, builtin_root)]
    code = protoc.main(["protoc", *roots, *outputs, PROTO_FILE])
    if code != 0:
        raise RuntimeError(f"protoc ended with {code} on {PROTO_FILE}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PROTO_ROOT)
