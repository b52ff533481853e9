"""What a chaos run does, and how much of it: the full form, and the short one of CI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from octavo_client.load.distribution import Lengths, parse_lengths

MODEL = "chaos"
DTYPE = "float16"
BLOCK_SIZE = 32
NUM_LAYERS = 2


@dataclass(frozen=True, slots=True)
class Form:
    """How much chaos.

    Attributes:
        name: Of the form.
        heads: num_q_heads, num_kv_heads and head_dim of the model.
        max_context: Tokens of its longest session.
        num_blocks: Of its pool.
        num_clients: Client processes; each has a connection, and a proxy, of its own.
        lanes_per_client: Threads of a client; each has one step in flight.
        sessions_per_client: Sessions that a client keeps open.
        prompt_tokens: Of a session.
        lease_s: Of a session; those of killed clients end by it.
        faults: How many of each kind.
        min_answers: Checked answers that the run must have.
        gap_s: Longest pause between a recovery and the next fault.
        disk_bytes: Of the snapshot folder's disk, where one can be mounted.
    """

    name: str
    heads: tuple[int, int, int]
    max_context: int
    num_blocks: int
    num_clients: int
    lanes_per_client: int
    sessions_per_client: int
    prompt_tokens: Lengths
    lease_s: float
    faults: Mapping[str, int]
    min_answers: int
    gap_s: float
    disk_bytes: int

    @property
    def model_flag(self) -> str:
        """What `octavo-server serve --model` takes."""
        num_q_heads, num_kv_heads, head_dim = self.heads
        return (
            f"name={MODEL},num_layers={NUM_LAYERS},num_q_heads={num_q_heads},"
            f"num_kv_heads={num_kv_heads},head_dim={head_dim},block_size={BLOCK_SIZE},"
            f"max_context={self.max_context},num_blocks={self.num_blocks}"
        )

    @property
    def num_faults(self) -> int:
        """Faults of all kinds."""
        return sum(self.faults.values())

    @property
    def num_sessions(self) -> int:
        """Sessions that are open at once."""
        return self.num_clients * self.sessions_per_client


FULL = Form(
    name="full",
    heads=(32, 8, 128),
    max_context=4096,
    num_blocks=8192,
    num_clients=8,
    lanes_per_client=2,
    sessions_per_client=25,
    prompt_tokens=parse_lengths("16-128:0.65,128-512:0.29,512-1536:0.04,3072-4000:0.02"),
    lease_s=40.0,
    faults={
        "server killed": 10,
        "server terminated, snapshot": 12,
        "server terminated, no snapshot": 6,
        "snapshot disk full": 6,
        "server killed while saving": 4,
        "server killed while restoring": 4,
        "server frozen": 6,
        "client killed": 22,
        "connection cut": 36,
        "connection delayed": 22,
        "connection corrupted": 30,
        "pool exhausted": 10,
        "lease expired": 14,
        "hostile messages": 20,
        "foreign sessions probed": 12,
    },
    min_answers=20_000,
    gap_s=1.0,
    disk_bytes=3 << 30,
)

_LONGEST = "server killed while restoring"
"""It starts two servers; the short form does without."""

SHORT = Form(
    name="short",
    heads=(8, 2, 64),
    max_context=512,
    num_blocks=1024,
    num_clients=3,
    lanes_per_client=2,
    sessions_per_client=8,
    prompt_tokens=parse_lengths("16-128:0.8,128-400:0.2"),
    lease_s=8.0,
    faults={kind: 1 for kind in FULL.faults if kind != _LONGEST}
    | {"connection cut": 2, "connection corrupted": 2},
    min_answers=500,
    gap_s=0.2,
    disk_bytes=256 << 20,
)

FORMS = {form.name: form for form in (FULL, SHORT)}
