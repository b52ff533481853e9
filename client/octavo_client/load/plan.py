"""What is run: the workload, the load points of a sweep, and each process's share of a point. All can be pickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from octavo_client._types import Model
from octavo_client.access import NO_ACCESS, Access, Endpoint
from octavo_client.load.distribution import Lengths, Mix

Kind = Literal["concurrency", "rate"]


@dataclass(frozen=True, slots=True)
class Workload:
    """What the sessions do, the same at every load point.

    Attributes:
        target: The server.
        mix: Models and their weights.
        models: The models, by name.
        dtype: Of q, k and v: "float16", "bfloat16" or "float32".
        seed: Of all that is drawn.
        prompt_tokens: Tokens that a session begins with, uploaded by Append.
        output_tokens: Tokens that are decoded before it is closed and another one is opened.
        sessions_per_step: Entries of a step.
        layers: Layers of each model that are used, from the first on; None = all.
        steps_per_stream: Steps in flight that share a Decode stream.
        check: Share of the answers that are checked.
        stage_times: Share of the steps that ask for the server's stage times.
        timeout_s: Seconds that a step may take.
        expected: Reasons of errors that are counted and survived; any other one fails the run.
        chaos: Kinds of faults that are injected.
        chaos_rate: Share of the steps that meet one.
        access: What proves the clients to the server; paths, not what is in them.
    """

    target: str
    mix: Mix
    models: Mapping[str, Model]
    dtype: str
    seed: int
    prompt_tokens: Lengths
    output_tokens: Lengths
    sessions_per_step: Lengths
    layers: int | None
    steps_per_stream: int
    check: float
    stage_times: float
    timeout_s: float
    expected: frozenset[str]
    chaos: frozenset[str]
    chaos_rate: float
    access: Access = NO_ACCESS

    @property
    def endpoint(self) -> Endpoint:
        """The server, and what proves the clients to it."""
        return Endpoint(self.target, self.access)

    def num_layers(self, model: str) -> int:
        """Return how many layers of a model are used."""
        num_layers = self.models[model].num_layers
        return num_layers if self.layers is None else min(self.layers, num_layers)


@dataclass(frozen=True, slots=True)
class LoadPoint:
    """One load of a sweep.

    Attributes:
        kind: "concurrency": `value` steps are always in flight. "rate": `value` steps become due a second.
        value: How much.
        num_lanes: Most steps in flight.
        num_groups: Sets of sessions that share their steps; a lane decodes its sets in turn, a token each.
    """

    kind: Kind
    value: float
    num_lanes: int
    num_groups: int

    @property
    def label(self) -> str:
        """Name it, such as "concurrency 8" or "rate 200"."""
        return f"{self.kind} {self.value:g}"


@dataclass(frozen=True, slots=True)
class Share:
    """What one process does of a load point.

    Attributes:
        point_idx: Of the sweep.
        process_idx: Which process.
        generation: How many processes were killed in its place before.
        num_lanes: Most steps in flight.
        num_groups: Sets of sessions.
        rate: Steps that become due a second; None = closed loop.
        max_steps: Most measured steps; None = any number.
    """

    point_idx: int
    process_idx: int
    generation: int
    num_lanes: int
    num_groups: int
    rate: float | None
    max_steps: int | None


def split_point(
    point: LoadPoint, point_idx: int, num_processes: int, max_steps: int | None
) -> list[Share]:
    """Cut a load point into the shares of at most `num_processes` processes, each with at least one lane and step."""
    num_shares = min(num_processes, point.num_lanes, max_steps or num_processes)
    rate = point.value / num_shares if point.kind == "rate" else None
    return [
        Share(
            point_idx,
            process_idx,
            0,
            part(point.num_lanes, process_idx, num_shares),
            part(point.num_groups, process_idx, num_shares),
            rate,
            None if max_steps is None else part(max_steps, process_idx, num_shares),
        )
        for process_idx in range(num_shares)
    ]


def part(whole: int, part_idx: int, num_parts: int) -> int:
    """Return one of `num_parts` parts of a number, as equal as can be; the larger ones come first."""
    return whole // num_parts + (part_idx < whole % num_parts)
