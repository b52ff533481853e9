"""One thread of a client: opens sessions, decodes tokens, and finds out after each fault what is still there."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from octavo_client import BatchResult, Client, Entry, Session
from octavo_client._errors import OctavoError, PositionMismatch, RefusedError
from octavo_client.load.checks import Sample, host_row
from octavo_client.load.content import Rows, Tensors, Walk, session_key, walk_of
from octavo_client.load.fate import reason_of
from tests.chaos.access import EXPECTED, GONE
from tests.chaos.account import Account, Loss
from tests.chaos.form import MODEL, NUM_LAYERS, Form
from tests.chaos.notes import Notes

_MOST_SESSIONS_PER_STEP = 8
_MOST_TOKENS_PER_ENTRY = 4
_SHARE_OF_LONG_ENTRIES = 0.1
_SHARE_CLOSED_ON_DISCONNECT = 0.1
_SHARE_RETIRED = 0.01
_SHARE_TRUNCATED = 0.02
_SHARE_OF_LEASE = 0.25
"""Of a lease, after which all are renewed."""

_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class LaneSetting:
    """What a lane works with.

    Attributes:
        form: Of the run.
        seed: Names the lane, the client's generation included.
        client_idx: The client's.
        client: Shared by its lanes.
        rows: Content.
        notes: Where the lane notes what it sees.
        may_send: Waits while the answers are checked that are there; False when the run is over.
    """

    form: Form
    seed: tuple[int, ...]
    client_idx: int
    client: Client
    rows: Rows
    notes: Notes
    may_send: Callable[[], bool]


@dataclass(slots=True, eq=False)
class Member:
    """A session of a lane.

    Attributes:
        session: As the client knows it.
        key: What its content is made from.
        walks: [num_layers] content.
        account: What it must hold.
        goal: Tokens that each layer gets by appends.
        closes_on_disconnect: Whether it ends with a connection.
        is_unsure: Whether the server has to be asked what it holds.
    """

    session: Session
    key: int
    walks: list[Walk]
    account: Account
    goal: int
    closes_on_disconnect: bool
    is_unsure: bool = False


class Lane:
    """Works for its own sessions.

    Args:
        setting: What it works with.
        num_sessions: How many it keeps open.
    """

    def __init__(self, setting: LaneSetting, num_sessions: int) -> None:
        self._setting = setting
        self._notes = setting.notes
        self._num_sessions = num_sessions
        self._rng = random.Random(session_key(*setting.seed))
        self._members: list[Member] = []
        self._num_opened = 0
        self._renew_at_s = 0.0

    def run(self) -> None:
        """Work until the run is over, then close what is open."""
        while self._setting.may_send():
            if len(self._members) < self._num_sessions:
                self._open()
            ready = [member for member in self._members if self._mend(member)]
            if ready:
                self._decode(self._draw(ready))
                self._truncate_one()
                self._retire()
            self._keep_alive()
        for member in list(self._members):
            self._close(member)

    # ---- Sessions -------------------------------------------------------------------------------

    def _open(self) -> None:
        """Open a session and upload its prompt."""
        key = session_key(*self._setting.seed, self._num_opened)
        self._num_opened += 1
        goal = self._setting.form.prompt_tokens.draw(self._rng)
        closes = self._rng.random() < _SHARE_CLOSED_ON_DISCONNECT
        sent_ns = time.monotonic_ns()
        try:
            self._notes.called()
            session = self._setting.client.open_session(
                MODEL, on_disconnect="close" if closes else "keep"
            )
        except OctavoError as error:
            self._note(error)
            return
        self._notes.opened()
        walks = [walk_of(key, layer) for layer in range(NUM_LAYERS)]
        member = Member(session, key, walks, Account(sent_ns), goal, closes)
        self._members.append(member)
        self._level(member)

    def _mend(self, member: Member) -> bool:
        """Find out what an unsure session holds and make its layers equally long; return whether it can go on."""
        if not member.is_unsure:
            return True
        asked_ns = time.monotonic_ns()
        try:
            self._notes.called()
            state = member.session.refresh()
        except OctavoError as error:
            self._trouble(member, "get", error)
            return False
        difference = member.account.settle(state.lengths, asked_ns)
        self._notes.differs(member.session.session_id, difference)
        member.is_unsure = False
        return self._level(member)

    def _level(self, member: Member) -> bool:
        """Append what layers lack; return whether that worked."""
        account = member.account
        member.goal = max(member.goal, *account.confirmed)
        for layer, walk in enumerate(member.walks):
            start, end = account.confirmed[layer], member.goal
            if start == end:
                continue
            rows = walk.kv_rows(start, end - start)
            account.send(layer, end)
            sent_ns = time.monotonic_ns()
            k, v = self._setting.rows.k[rows], self._setting.rows.v[rows]
            try:
                self._notes.called()
                member.session.append(k, v, layer=layer, start_pos=start)
            except OctavoError as error:
                self._trouble(member, "append", error)
                return False
            account.confirm(layer, end, sent_ns)
        return True

    def _truncate_one(self) -> None:
        """Truncate a session now and then; what it forgets is appended again, as other steps."""
        ready = [member for member in self._members if not member.is_unsure]
        if not ready or self._rng.random() >= _SHARE_TRUNCATED:
            return
        member = self._rng.choice(ready)
        length = self._rng.randint(1, max(member.account.confirmed))
        member.account.cut(length)
        asked_ns = time.monotonic_ns()
        try:
            self._notes.called()
            member.session.truncate(length)
        except OctavoError as error:
            self._trouble(member, "truncate", error)
        else:
            member.account.was_cut(asked_ns)
        member.goal = max(member.account.confirmed)

    def _keep_alive(self) -> None:
        """Renew all leases now and then."""
        if time.monotonic() < self._renew_at_s:
            return
        self._renew_at_s = time.monotonic() + self._setting.form.lease_s * _SHARE_OF_LEASE
        sessions = {member.session.session_id: member for member in self._members}
        asked_ns = time.monotonic_ns()
        try:
            self._notes.called()
            ended = self._setting.client.keep_alive([m.session for m in self._members])
        except OctavoError as error:
            self._note(error)
            return
        for session_id, member in sessions.items():
            if session_id in ended:
                self._trouble(member, "keep alive", ended[session_id])
            else:
                member.account.seen_ns = max(member.account.seen_ns, asked_ns)

    def _retire(self) -> None:
        """Close a session now and then, and those that are full."""
        most = self._setting.form.max_context - _MOST_TOKENS_PER_ENTRY
        for member in list(self._members):
            is_full = max(member.account.sent) >= most
            if is_full or self._rng.random() < _SHARE_RETIRED / len(self._members):
                self._close(member)

    def _close(self, member: Member) -> None:
        try:
            self._notes.called()
            member.session.close()
        except OctavoError as error:
            self._trouble(member, "close", error)
        else:
            self._notes.closed()
            self._members.remove(member)

    # ---- Steps ----------------------------------------------------------------------------------

    def _draw(self, ready: Sequence[Member]) -> list[Member]:
        most = min(_MOST_SESSIONS_PER_STEP, len(ready))
        return self._rng.sample(ready, self._rng.randint(1, most))

    def _decode(self, members: list[Member]) -> None:
        """Decode one or a few tokens of some sessions through all layers."""
        is_long = self._rng.random() < _SHARE_OF_LONG_ENTRIES
        num_tokens = self._rng.randint(2, _MOST_TOKENS_PER_ENTRY) if is_long else 1
        for layer in range(NUM_LAYERS):
            members = self._step(members, layer, num_tokens)
            if not members:
                return
        for member in members:
            member.goal += num_tokens

    def _step(self, members: list[Member], layer: int, num_tokens: int) -> list[Member]:
        """Send a step; return the sessions that it was answered for."""
        starts = [member.account.confirmed[layer] for member in members]
        tensors = self._tensors(members, layer, starts, num_tokens)
        pairs = list(zip(members, starts, strict=True))
        for member, start in pairs:
            member.account.send(layer, start + num_tokens)
        entries = [Entry(member.session, layer, num_tokens, start) for member, start in pairs]
        sent_ns = time.monotonic_ns()
        try:
            self._notes.called()
            result = self._setting.client.decode_batch(entries, *tensors)
        except OctavoError as error:
            for member in members:
                self._trouble(member, "decode", error, is_counted=member is members[0])
            return []
        return self._take(pairs, layer, num_tokens, (sent_ns, time.monotonic_ns()), result)

    def _take(
        self,
        pairs: Sequence[tuple[Member, int]],
        layer: int,
        num_tokens: int,
        answer: tuple[int, int],
        result: BatchResult,
    ) -> list[Member]:
        """Note the answers of a step; return the sessions that have one."""
        answered: list[Member] = []
        samples: list[Sample] = []
        for idx, (member, start) in enumerate(pairs):
            error = result.errors.get(idx)
            if error is not None:
                self._trouble(member, "decode", error)
                continue
            member.account.confirm(layer, start + num_tokens, answer[0])
            answered.append(member)
            samples += [
                Sample(
                    MODEL, member.key, layer, start + i, host_row(result.out, idx * num_tokens + i)
                )
                for i in range(num_tokens)
            ]
        if answered:
            self._notes.answered(answer, samples)
        return answered

    def _tensors(
        self, members: Sequence[Member], layer: int, starts: Sequence[int], num_tokens: int
    ) -> Tensors:
        walks = [member.walks[layer] for member in members for _ in range(num_tokens)]
        positions = [start + i for start in starts for i in range(num_tokens)]
        q, k, v = self._setting.rows.step(walks, positions)
        return np.ascontiguousarray(q), np.ascontiguousarray(k), np.ascontiguousarray(v)

    # ---- Trouble --------------------------------------------------------------------------------

    def _trouble(
        self, member: Member, call: str, error: OctavoError, *, is_counted: bool = True
    ) -> None:
        """Note what went wrong with a session in a call, and whether it is gone."""
        was_unsure, member.is_unsure = member.is_unsure, True
        reason = reason_of(error)
        if reason in GONE:
            self._members.remove(member)
            self._notes.lost(self._loss(member, call, reason))
        elif isinstance(error, PositionMismatch):
            self._mismatch(member, error, was_unsure)
        elif is_counted:
            self._note(error)

    def _mismatch(self, member: Member, error: PositionMismatch, was_unsure: bool) -> None:
        """A position is refused only when the server's length is another, which the account may allow."""
        self._notes.error(reason_of(error))
        if error.length == error.start_pos:
            text = f"session {member.session.session_id}: {error}"
            self._notes.complain(f"{text} (refused at its own length, unsure {was_unsure})")

    def _note(self, error: OctavoError) -> None:
        """Count an error that faults explain; complain of any other."""
        reason = reason_of(error)
        if reason not in EXPECTED:
            self._notes.complain(f"unexpected error {reason}: {error}")
            return
        self._notes.error(reason)
        hint_s = error.retry_after_s if isinstance(error, RefusedError) else None
        time.sleep(min(hint_s or _PAUSE_S, 1.0) * self._rng.uniform(0.5, 1.0))

    def _loss(self, member: Member, call: str, reason: str) -> Loss:
        return Loss(
            client_idx=self._setting.client_idx,
            session_id=member.session.session_id,
            reason=reason,
            call=call,
            num_tokens=sum(member.account.confirmed),
            since_ns=member.account.seen_ns,
            until_ns=time.monotonic_ns(),
            closes_on_disconnect=member.closes_on_disconnect,
        )
