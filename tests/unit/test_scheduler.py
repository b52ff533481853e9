"""The scheduler: what shares a launch, what waits, and what is dropped."""

from octavo_server.scheduler import WHOLE_SESSION, Scheduler, WorkItem, WorkKey

Keys = list[tuple[int, int]]


def item(name: str, keys: Keys, batch_key: str | None = "m", num_tokens: int = 1) -> WorkItem[str]:
    return WorkItem(name, frozenset(WorkKey(*key) for key in keys), batch_key, num_tokens)


def turns(*items: WorkItem[str], max_batch_tokens: int = 100) -> list[list[str]]:
    """Return every batch in turn until the queue is empty."""
    scheduler = Scheduler[str](max_batch_tokens)
    for queued in items:
        scheduler.submit(queued)
    batches = []
    while len(scheduler):
        batches.append(scheduler.next_turn(now=0.0).batch)
    return batches


def test_steps_of_different_sessions_and_layers_share_a_launch() -> None:
    assert turns(item("a", [(1, 0)]), item("b", [(2, 0)]), item("c", [(1, 1)])) == [["a", "b", "c"]]


def test_one_session_and_layer_keeps_its_order() -> None:
    queue = [item("a", [(1, 0)]), item("b", [(1, 0)]), item("c", [(2, 0)]), item("d", [(1, 0)])]
    assert turns(*queue) == [["a", "c"], ["b"], ["d"]]


def test_a_step_that_waits_holds_back_what_follows_it_on_any_of_its_entries() -> None:
    queue = [item("a", [(1, 0)]), item("b", [(1, 0), (2, 0)]), item("c", [(2, 0)])]
    assert turns(*queue) == [["a"], ["b"], ["c"]]


def test_other_models_and_dtypes_do_not_share_a_launch() -> None:
    queue = [item("a", [(1, 0)]), item("b", [(2, 0)], "other"), item("c", [(3, 0)])]
    assert turns(*queue) == [["a", "c"], ["b"]]


def test_work_on_a_whole_session_waits_and_is_waited_for() -> None:
    queue = [
        item("a", [(1, 0)]),
        item("close 1", [(1, WHOLE_SESSION)], None),
        item("b", [(1, 1)]),
        item("c", [(2, 0)]),
    ]
    assert turns(*queue) == [["a", "c"], ["close 1"], ["b"]]


def test_work_without_a_batch_key_runs_alone() -> None:
    queue = [item("x", [(1, WHOLE_SESSION)], None), item("y", [(2, WHOLE_SESSION)], None)]
    assert turns(*queue) == [["x"], ["y"]]


def test_a_launch_is_bounded_but_takes_any_single_step() -> None:
    queue = [item("a", [(1, 0)], num_tokens=500), item("b", [(2, 0)], num_tokens=60)]
    queue += [item("c", [(3, 0)], num_tokens=60), item("d", [(4, 0)], num_tokens=40)]
    assert turns(*queue) == [["a"], ["b", "d"], ["c"]]


def test_expired_and_cancelled_work_leaves_the_queue_and_holds_nothing_up() -> None:
    scheduler = Scheduler[str](100)
    keys = frozenset([WorkKey(1, 0)])
    scheduler.submit(WorkItem("late", keys, "m", 1, deadline=5.0))
    scheduler.submit(WorkItem("gone", keys, "m", 1, is_cancelled=lambda: True))
    scheduler.submit(WorkItem("on time", keys, "m", 1, deadline=5.1))
    assert scheduler.next_turn(now=5.0) == (["on time"], ["late"])
    assert len(scheduler) == 0


def test_what_is_left_can_be_taken_unrun() -> None:
    scheduler = Scheduler[str](100)
    for name in "ab":
        scheduler.submit(item(name, [(1, 0)]))
    assert scheduler.clear() == ["a", "b"]
    assert len(scheduler) == 0
