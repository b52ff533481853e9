"""The command behind `make fuzz`: a coverage-guided fuzzer, atheris, over what the service parses by itself.

The first byte of an input chooses the target. Seeds are made from valid messages; what is found stays in the corpus.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["octavo.v1.tensor_fields", "octavo_server"]):
    from tests.fuzz.targets import TARGETS, changed, run_target

from tests.fuzz.corpus import write_corpus

_CORPUS = Path("build/fuzz-corpus")
_SHARE_OF_FIELDS = 0.3


def main() -> None:
    """Fuzz until libFuzzer's arguments say to end; what comes after them are corpus folders and inputs."""
    arguments = sys.argv[1:]
    if not any(not argument.startswith("-") for argument in arguments):
        write_corpus(_CORPUS, list(TARGETS))
        arguments = [f"-artifact_prefix={_CORPUS.parent}/", *arguments, str(_CORPUS)]
    atheris.Setup([sys.argv[0], *arguments], run_target, custom_mutator=mutate)
    atheris.Fuzz()


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change an input: its message's fields, or as libFuzzer does."""
    rng = random.Random(seed)
    if data and rng.random() < _SHARE_OF_FIELDS:
        return changed(data, rng)[:max_size]
    changed_bytes: bytes = atheris.Mutate(data, max_size)
    return changed_bytes


if __name__ == "__main__":
    main()
