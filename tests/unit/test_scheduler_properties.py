"""What holds of the scheduler whatever is queued: order, sharing, progress, no starvation, turns between clients."""

from collections import Counter
from dataclasses import dataclass
from itertools import combinations, count, pairwise

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from octavo_server.scheduler import MAX_PASSED_OVER, Scheduler
from octavo_server.work import WHOLE_SESSION, WorkItem, WorkKey

MAX_TOKENS, MAX_PROMPT_TOKENS = 20, 10
SESSIONS, LAYERS = st.integers(1, 4), st.integers(0, 1)
LAYER_KEYS = st.frozensets(st.builds(WorkKey, SESSIONS, LAYERS), min_size=1, max_size=3)
NUM_TOKENS = st.integers(1, 25)


@dataclass(eq=False)
class Work:
    """A piece of work and what became of it."""

    arrival: int
    is_cancelled: bool = False


def conflict(one: WorkItem[Work], other: WorkItem[Work]) -> bool:
    """Whether two pieces of work touch the same layer, or one touches all of a session of the other's."""
    return any(
        a.session_handle == b.session_handle
        and (a.layer == b.layer or WHOLE_SESSION in (a[1], b[1]))
        for a in one.keys
        for b in other.keys
    )


class SchedulerMachine(RuleBasedStateMachine):
    """Queues, cancels and takes turns in any order; keeps beside the scheduler what is queued."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler[Work](MAX_TOKENS, MAX_PROMPT_TOKENS)
        self.queued: dict[int, WorkItem[Work]] = {}
        self.arrivals = count()
        self.now = 0.0

    @rule(
        keys=LAYER_KEYS,
        batch_key=st.sampled_from("mn"),
        num_tokens=NUM_TOKENS,
        client=st.sampled_from("abc"),
        is_prompt=st.booleans(),
        patience=st.sampled_from([2.0, 5.0, float("inf")]),
    )
    def queue_step(
        self,
        keys: frozenset[WorkKey],
        batch_key: str,
        num_tokens: int,
        client: str,
        is_prompt: bool,
        patience: float,
    ) -> None:
        work = Work(next(self.arrivals))
        self.submit(
            WorkItem(
                work,
                keys,
                batch_key,
                num_tokens,
                self.now + patience,
                lambda: work.is_cancelled,
                client,
                is_prompt,
            )
        )

    @rule(session=SESSIONS)
    def queue_close(self, session: int) -> None:
        work = Work(next(self.arrivals))
        keys = frozenset([WorkKey(session, WHOLE_SESSION)])
        self.submit(WorkItem(work, keys, is_cancelled=lambda: work.is_cancelled))

    @rule(pick=st.integers(0, 1000))
    def cancel(self, pick: int) -> None:
        if self.queued:
            list(self.queued.values())[pick % len(self.queued)].payload.is_cancelled = True

    @rule(passes=st.sampled_from([0.0, 0.0, 1.0]))
    def take_turn(self, passes: float) -> None:
        self.now += passes
        live = [item for item in self.queued.values() if not item.payload.is_cancelled]
        turn = self.scheduler.next_turn(self.now)
        assert {work.arrival for work in turn.expired} == {
            item.payload.arrival for item in live if item.deadline <= self.now
        }
        batch = [self.queued.pop(work.arrival) for work in turn.batch]
        for work in turn.expired:
            del self.queued[work.arrival]
        self.check_batch(batch)
        assert batch or all(item.deadline <= self.now for item in live), "live work was left"
        still_queued = {item.payload.arrival for item in self.scheduler.items}
        for arrival in self.queued.keys() - still_queued:
            assert self.queued.pop(arrival).payload.is_cancelled, "live work was lost"

    @invariant()
    def what_is_queued_is_there_in_its_order(self) -> None:
        items = self.scheduler.items
        assert len(self.scheduler) == len(items)
        assert all(a.payload.arrival < b.payload.arrival for a, b in pairwise(items))
        assert {item.payload.arrival for item in items} == self.queued.keys()

    def submit(self, item: WorkItem[Work]) -> None:
        self.queued[item.payload.arrival] = item
        self.scheduler.submit(item)

    def check_batch(self, batch: list[WorkItem[Work]]) -> None:
        """Check what runs together, and that nothing it has to wait for is still queued."""
        assert not any(item.payload.is_cancelled for item in batch)
        assert all(not conflict(a, b) for a, b in combinations(batch, 2))
        assert len({(item.batch_key, item.is_prompt) for item in batch}) <= 1
        room = MAX_PROMPT_TOKENS if batch and batch[0].is_prompt else MAX_TOKENS
        assert len(batch) <= 1 or sum(item.num_tokens for item in batch) <= room
        for item in batch:
            for other in self.queued.values():
                is_before = other.payload.arrival < item.payload.arrival
                is_live = not other.payload.is_cancelled and other.deadline > self.now
                assert not (is_before and is_live and conflict(item, other)), "overtaken"


SchedulerMachine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None
)
TestOrder = SchedulerMachine.TestCase


def independent(
    session: int, client: str, num_tokens: int, batch_key: str = "m", *, is_prompt: bool = False
) -> WorkItem[str]:
    """Return work that conflicts with no other."""
    keys = frozenset([WorkKey(session, 0)])
    return WorkItem(client, keys, batch_key, num_tokens, client=client, is_prompt=is_prompt)


@given(
    flood=st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from("mno"), NUM_TOKENS, st.booleans()),
        min_size=1,
        max_size=12,
    ),
    num_before=st.integers(0, 5),
    num_tokens=NUM_TOKENS,
    is_prompt=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_nobody_starves(
    flood: list[tuple[str, str, int, bool]], num_before: int, num_tokens: int, is_prompt: bool
) -> None:
    """However much the others queue before every launch, a client's next work runs within a bound."""
    scheduler = Scheduler[str](MAX_TOKENS, MAX_PROMPT_TOKENS)
    sessions = count()

    def pour() -> None:
        for client, batch_key, tokens, is_flood_prompt in flood:
            scheduler.submit(
                independent(next(sessions), client, tokens, batch_key, is_prompt=is_flood_prompt)
            )

    for _ in range(num_before):
        pour()
        scheduler.next_turn(0.0)
    scheduler.submit(independent(next(sessions), "victim", num_tokens, is_prompt=is_prompt))
    num_clients = len({client for client, *_ in flood}) + 1
    num_batch_keys = len({batch_key for _, batch_key, *_ in flood} | {"m"})
    launches_for_one_of_the_kind = MAX_PASSED_OVER + 1 if is_prompt else 2
    for _ in range(num_clients * num_batch_keys * launches_for_one_of_the_kind):
        pour()
        if "victim" in scheduler.next_turn(0.0).batch:
            return
    raise AssertionError("the victim was never served")


@given(
    backlogs=st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 30), min_size=2),
    num_tokens=st.integers(1, MAX_TOKENS),
    is_prompt=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_clients_that_wait_are_served_alike(
    backlogs: dict[str, int], num_tokens: int, is_prompt: bool
) -> None:
    """Of work of one size, no client that still waits has had two pieces fewer than another."""
    scheduler = Scheduler[str](MAX_TOKENS, MAX_PROMPT_TOKENS)
    sessions = count()
    for client, backlog in backlogs.items():
        for _ in range(backlog):
            scheduler.submit(independent(next(sessions), client, num_tokens, is_prompt=is_prompt))
    served: Counter[str] = Counter(dict.fromkeys(backlogs, 0))
    while len(scheduler):
        served.update(scheduler.next_turn(0.0).batch)
        waiting = [
            served[client] for client, backlog in backlogs.items() if served[client] < backlog
        ]
        if waiting:
            assert max(served.values()) - min(waiting) <= 1
    assert served == Counter(backlogs)
