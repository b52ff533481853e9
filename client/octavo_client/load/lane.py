"""A lane: one step in flight, over and over, for its own sessions, layer by layer and token by token."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, cast

from octavo_client import BatchResult, Entry, StepOptions
from octavo_client._errors import OctavoError
from octavo_client.load.chaos import rival_append
from octavo_client.load.checks import Sample, host_row
from octavo_client.load.connection import Connection, LoadSession
from octavo_client.load.content import Tensors, session_key
from octavo_client.load.fate import Fate, delay_after, fate_of
from octavo_client.load.pace import Pace, Turn
from octavo_client.load.plan import part
from octavo_client.load.source import Rig, SessionSource

HAS_STAGE_TIMES = "stage_times" in StepOptions.__annotations__

_NUM_TRIES_TO_SET_UP = 3
_NS_PER_US = 1000


@dataclass(slots=True)
class Group:
    """Sessions that share their steps.

    Attributes:
        model: Theirs.
        size: How many there should be.
        members: Those that are open.
    """

    model: str
    size: int
    members: list[LoadSession]


class Draft(NamedTuple):
    """A step, made before it is due."""

    members: list[LoadSession]
    layer: int
    tensors: Tensors

    def entries(self) -> list[Entry]:
        """Return one token of each member, at the position where its K and V belong."""
        return [Entry(m.session, self.layer, 1, m.position) for m in self.members]


class Attempt(NamedTuple):
    """Leave to send a step, how often it was sent with this one, and what is to happen to it."""

    turn: Turn
    num_tries: int
    chaos: str | None


class Times(NamedTuple):
    """When a step was handed to the client, on its way, answered, and back, in nanoseconds."""

    begun: int
    sent: int
    arrived: int
    returned: int


class Lane:
    """Runs steps on a thread of its own.

    Args:
        rig: What the lanes share.
        lane_idx: Which lane, from 0 in this process.
        connection: Its way to the server.
    """

    def __init__(self, rig: Rig, lane_idx: int, connection: Connection) -> None:
        self._rig = rig
        self._workload = rig.workload
        self._connection = connection
        self._source = SessionSource(rig, lane_idx, connection)
        share = rig.share
        self._rng = random.Random(
            session_key(rig.workload.seed, share.process_idx, share.generation, lane_idx, -1)
        )
        self._groups = [
            Group(
                rig.workload.mix.draw(self._rng), rig.workload.sessions_per_step.draw(self._rng), []
            )
            for _ in range(part(share.num_groups, lane_idx, share.num_lanes))
        ]

    def set_up(self) -> None:
        """Open the sessions that the run begins with, as far as the server has room."""
        for group in self._groups:
            for _ in range(_NUM_TRIES_TO_SET_UP):
                if self._fill(group, is_first=True) or self._rig.stopping.is_set():
                    break

    def run(self, pace: Pace) -> None:
        """Decode tokens until the pace ends."""
        for group in itertools.cycle(self._groups):
            if pace.is_over() or self._rig.stopping.is_set():
                return
            self._renew(group)
            if group.members and not self._run_token(group, pace):
                return

    def close(self) -> None:
        """Close all sessions."""
        for group in self._groups:
            self._drop(group, list(group.members))

    # ---- Sessions -------------------------------------------------------------------------------

    def _renew(self, group: Group) -> None:
        self._drop(group, [member for member in group.members if member.remaining <= 0])
        self._fill(group, is_first=False)

    def _fill(self, group: Group, *, is_first: bool) -> bool:
        """Open what is missing; after a refusal wait as long as it says, and return False."""
        while len(group.members) < group.size:
            try:
                group.members.append(self._source.open(group.model, is_first=is_first))
            except OctavoError as error:
                self._rig.book.error(error)
                self._wait(delay_after(error, 1, self._rng.random()))
                return False
        return True

    def _drop(self, group: Group, members: Iterable[LoadSession]) -> None:
        for member in members:
            group.members.remove(member)
            self._source.close(member)

    def _wait(self, seconds: float) -> None:
        self._rig.stopping.wait(seconds)

    # ---- Steps ----------------------------------------------------------------------------------

    def _run_token(self, group: Group, pace: Pace) -> bool:
        """Decode one token of a group through its layers; False when the run is over."""
        for layer in range(self._workload.num_layers(group.model)):
            if group.members and not self._run_layer(group, layer, pace):
                return False
        for member in group.members:
            member.position += 1
            member.remaining -= 1
        return True

    def _run_layer(self, group: Group, layer: int, pace: Pace) -> bool:
        draft = self._draft(group, list(group.members), layer)
        turn = pace.next_turn()
        if turn is None:
            return False
        chaos = self._rig.chaos.pick()
        for num_tries in itertools.count(1):
            refused = self._send(group, draft, Attempt(turn, num_tries, chaos))
            again, delay_s = self._sort_out(group, refused, num_tries)
            if not again:
                return True
            if self._rig.stopping.is_set():
                return False
            self._wait(delay_s)
            draft = self._draft(group, again, layer)
            chaos, turn = None, turn._replace(is_measured=turn.is_measured and chaos is None)
        return False

    def _draft(self, group: Group, members: list[LoadSession], layer: int) -> Draft:
        walks = [member.walks[layer] for member in members]
        positions = [member.position for member in members]
        return Draft(members, layer, self._rig.rows[group.model].step(walks, positions))

    def _sort_out(
        self, group: Group, refused: list[tuple[LoadSession, OctavoError]], num_tries: int
    ) -> tuple[list[LoadSession], float]:
        """Note what was refused; return who tries again, and after how many seconds."""
        again: list[LoadSession] = []
        given_up: list[LoadSession] = []
        delay_s = 0.0
        for member, error in refused:
            fate = fate_of(error, member.position, is_unsure=member.is_unsure, num_tries=num_tries)
            if fate is Fate.APPLIED:
                member.is_unsure = False
                self._rig.book.stored_unanswered()
                continue
            self._rig.book.error(error)
            member.is_unsure |= fate is Fate.UNSURE
            (given_up if fate is Fate.GIVEN_UP else again).append(member)
            if fate is Fate.AGAIN:
                delay_s = max(delay_s, delay_after(error, num_tries, self._rng.random()))
        self._drop(group, given_up)
        return again, delay_s

    def _send(
        self, group: Group, draft: Draft, attempt: Attempt
    ) -> list[tuple[LoadSession, OctavoError]]:
        """Send a step and take its answer; return the members without one."""
        try:
            if attempt.chaos == "rival":
                self._meet_rival(group, draft)
            times, result = self._call(draft, attempt.chaos)
        except OctavoError as error:
            return [(member, error) for member in draft.members]
        answered = [i for i in range(len(draft.members)) if i not in result.errors]
        for idx in answered:
            draft.members[idx].is_unsure = False
        self._sample(group, draft, answered, result)
        if attempt.turn.is_measured and attempt.chaos is None and answered:
            self._measure(draft, attempt, times, result)
        return [(draft.members[idx], error) for idx, error in result.errors.items()]

    def _call(self, draft: Draft, chaos: str | None) -> tuple[Times, BatchResult]:
        clock = self._rig.clock
        client = self._connection.adopt(draft.members)
        entries, options = draft.entries(), self._options(chaos)
        arrivals: list[int] = []
        begun = clock()
        future = client.submit_batch(entries, *draft.tensors, **options)
        sent = clock()
        future.add_done_callback(lambda _: arrivals.append(clock()))
        if chaos == "cancel":
            self._wait(self._rig.chaos.short_s())
            self._connection.reset()
        result = future.result()
        returned = clock()
        return Times(begun, sent, arrivals[0] if arrivals else returned, returned), result

    def _options(self, chaos: str | None) -> StepOptions:
        options: dict[str, object] = {}
        if chaos is not None:
            self._rig.book.chaos(chaos)
        if chaos == "deadline":
            options["timeout"] = self._rig.chaos.short_s()
        if HAS_STAGE_TIMES and self._rng.random() < self._workload.stage_times:
            options["stage_times"] = True
        return cast(StepOptions, options)

    def _meet_rival(self, group: Group, draft: Draft) -> None:
        member = draft.members[0]
        rows = self._rig.rows[group.model]
        other = rows.step([member.walks[draft.layer]], [member.position + 1])
        position = member.position - 1
        session_id = member.session.session_id
        self._connection.adopt([member])
        fault = rival_append(self._connection.endpoint, session_id, draft.layer, position, other)
        if fault:
            self._rig.book.fault(fault)

    # ---- Notes ----------------------------------------------------------------------------------

    def _sample(self, group: Group, draft: Draft, answered: list[int], result: BatchResult) -> None:
        share = self._workload.check
        samples = [
            Sample(group.model, m.key, draft.layer, m.position, host_row(result.out, idx))
            for idx, m in ((idx, draft.members[idx]) for idx in answered)
            if share and self._rng.random() < share
        ]
        if samples:
            with self._rig.book.lock:
                self._rig.book.page.samples += samples
                self._rig.book.page.tally.num_sampled += len(samples)

    def _measure(self, draft: Draft, attempt: Attempt, times: Times, result: BatchResult) -> None:
        turn = attempt.turn
        latency = times.returned - (times.begun if turn.due_ns is None else turn.due_ns)
        answered = [m for i, m in enumerate(draft.members) if i not in result.errors]
        with self._rig.book.lock:
            tally = self._rig.book.page.tally
            tally.num_steps += 1
            tally.last_ns = max(tally.last_ns, times.returned)
            tally.num_layer_steps += len(answered)
            if draft.layer == len(answered[0].walks) - 1:
                tally.num_tokens += len(answered)
            tally.context += sum(member.position + 1 for member in answered)
            tally.sent_bytes += sum(tensor.nbytes for tensor in draft.tensors)
            tally.received_bytes += result.out.nbytes
            tally.latency.record(latency)
            tally.by_sessions[len(draft.members)] += 1
            tally.send_ns += times.sent - times.begun
            tally.receive_ns += times.returned - times.arrived
            if turn.due_ns is not None and turn.was_free and attempt.num_tries == 1:
                tally.lateness.record(times.begun - turn.due_ns)
            tally.num_without_lane += not turn.was_free
            self._measure_stages(times, result)

    def _measure_stages(self, times: Times, result: BatchResult) -> None:
        stages = getattr(result, "stage_times", None)
        if stages is None:
            return
        tally = self._rig.book.page.tally
        tally.num_staged += 1
        tally.queue_ns += stages.queue_us * _NS_PER_US
        tally.copy_in_ns += stages.copy_in_us * _NS_PER_US
        tally.kernel_ns += stages.kernel_us * _NS_PER_US
        tally.copy_out_ns += stages.copy_out_us * _NS_PER_US
        tally.batch_sizes[stages.batch_size] += 1
        tally.staged_latency_ns += times.returned - times.begun
        tally.staged_send_ns += times.sent - times.begun
        tally.staged_receive_ns += times.returned - times.arrived
