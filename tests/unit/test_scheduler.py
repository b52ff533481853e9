"""The scheduler: what shares a launch, whose turn it is, what waits, and what is dropped."""

from itertools import chain

from octavo_server.scheduler import MAX_PASSED_OVER, Scheduler
from octavo_server.work import WHOLE_SESSION, WorkItem, WorkKey

Keys = list[tuple[int, int]]


def item(
    name: str,
    keys: Keys,
    batch_key: str | None = "m",
    num_tokens: int = 1,
    client: str = "",
    *,
    is_prompt: bool = False,
) -> WorkItem[str]:
    return WorkItem(
        name,
        frozenset(WorkKey(*key) for key in keys),
        batch_key,
        num_tokens,
        client=client,
        is_prompt=is_prompt,
    )


def of_client(client: str, *num_tokens: int) -> list[WorkItem[str]]:
    """Return work named a0, a1, ... of a client a, each of a session of its own."""
    return [
        item(f"{client}{idx}", [(ord(client) * 100 + idx, 0)], num_tokens=num, client=client)
        for idx, num in enumerate(num_tokens)
    ]


def prompts(*names: str, num_tokens: int = 40) -> list[WorkItem[str]]:
    """Return prompts, each of a session and a client of its own."""
    return [
        item(name, [(1000 + idx, 0)], "kv", num_tokens, name, is_prompt=True)
        for idx, name in enumerate(names)
    ]


def queue_of(*items: WorkItem[str], max_tokens: int = 100) -> Scheduler[str]:
    scheduler = Scheduler[str](max_tokens, max_prompt_tokens=50)
    for queued in items:
        scheduler.submit(queued)
    return scheduler


def turns(*items: WorkItem[str], max_tokens: int = 100) -> list[list[str]]:
    """Return every batch in turn until the queue is empty."""
    scheduler = queue_of(*items, max_tokens=max_tokens)
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


def test_batch_keys_take_turns() -> None:
    queue = of_client("a", 90, 90, 90) + of_client("b", 90)
    queue += [item("x", [(1, 0)], "other"), item("y", [(2, 0)], "other", 100)]
    assert turns(*queue) == [["a0"], ["x"], ["b0"], ["y"], ["a1"], ["a2"]]


def test_work_on_a_whole_session_waits_and_is_waited_for() -> None:
    queue = [
        item("a", [(1, 0)]),
        item("close 1", [(1, WHOLE_SESSION)], None),
        item("b", [(1, 1)]),
        item("c", [(2, 0)]),
    ]
    assert turns(*queue) == [["a", "c"], ["close 1"], ["b"]]


def test_work_on_a_whole_session_waits_for_every_layer() -> None:
    queue = [
        item("a", [(1, 0)]),
        item("b", [(1, 1)], "other"),
        item("close 1", [(1, WHOLE_SESSION)], None),
        item("again", [(1, WHOLE_SESSION)], None),
    ]
    assert turns(*queue) == [["a"], ["b"], ["close 1"], ["again"]]


def test_work_that_takes_no_launch_runs_together() -> None:
    queue = [item("x", [(1, WHOLE_SESSION)], None), item("y", [(2, WHOLE_SESSION)], None)]
    assert turns(item("a", [(3, 0)]), *queue) == [["a"], ["x", "y"]]


def test_a_launch_is_bounded_but_takes_any_single_step() -> None:
    assert turns(*of_client("a", 500, 60, 40, 60)) == [["a0"], ["a1", "a2"], ["a3"]]


def test_clients_take_turns_when_a_launch_cannot_take_all() -> None:
    flood = of_client("a", *[30] * 7)
    queue = flood + of_client("b", 30, 30) + of_client("c", 30)
    assert turns(*queue) == [["a0", "b0", "c0"], ["a1", "b1", "a2"], ["a3", "a4", "a5"], ["a6"]]


def test_the_next_launch_goes_on_with_the_client_where_the_last_one_stopped() -> None:
    queue = of_client("a", 40, 40) + of_client("b", 40, 40) + of_client("c", 40, 40)
    assert turns(*queue) == [["a0", "b0"], ["c0", "a1"], ["b1", "c1"]]


def test_large_work_of_one_client_is_not_passed_over_again_and_again() -> None:
    queue = of_client("a", *[10] * 12) + of_client("b", 95)
    assert turns(*queue)[:2] == [[f"a{idx}" for idx in range(10)], ["b0"]]


def test_prompts_share_no_launch_with_decode_steps_and_take_fewer_tokens() -> None:
    queue = [*prompts("p", "q", "r", num_tokens=25), *of_client("a", 1)]
    assert turns(*queue) == [["a0"], ["p", "q"], ["r"]]


def test_prompts_give_way_to_decode_steps_but_not_for_ever() -> None:
    queue = prompts("p", "q", "r") + of_client("a", *[100] * 8)
    assert MAX_PASSED_OVER == 3
    assert list(chain.from_iterable(turns(*queue))) == [
        *("a0", "a1", "a2", "p"),
        *("a3", "a4", "a5", "q"),
        *("a6", "a7", "r"),
    ]


def test_a_prompt_that_comes_late_is_counted_for_from_then_on() -> None:
    scheduler = queue_of(*of_client("a", *[100] * 9))
    assert [scheduler.next_turn(0.0).batch for _ in range(4)] == [["a0"], ["a1"], ["a2"], ["a3"]]
    scheduler.submit(*prompts("p"))
    assert [scheduler.next_turn(0.0).batch for _ in range(5)] == [
        ["a4"],
        ["a5"],
        ["a6"],
        ["p"],
        ["a7"],
    ]


def test_a_decode_step_waits_for_the_prompt_before_it_in_its_session() -> None:
    queue = [
        item("p", [(1, 0)], "kv", 40, is_prompt=True),
        item("after p", [(1, 0)]),
        item("other layer", [(1, 1)]),
    ]
    assert turns(*queue) == [["other layer"], ["p"], ["after p"]]


def test_expired_and_cancelled_work_leaves_the_queue_and_holds_nothing_up() -> None:
    scheduler = Scheduler[str](100, 100)
    keys = frozenset([WorkKey(1, 0)])
    scheduler.submit(WorkItem("late", keys, "m", 1, deadline=5.0))
    scheduler.submit(WorkItem("gone", keys, "m", 1, is_cancelled=lambda: True))
    scheduler.submit(WorkItem("on time", keys, "m", 1, deadline=5.1))
    assert scheduler.next_turn(now=5.0) == (["on time"], ["late"])
    assert len(scheduler) == 0


def test_work_that_came_alone_may_have_expired_or_been_cancelled() -> None:
    scheduler = Scheduler[str](100, 100)
    keys = frozenset([WorkKey(1, 0)])
    scheduler.submit(WorkItem("late", keys, "m", 1, deadline=5.0))
    assert scheduler.next_turn(now=5.0) == ([], ["late"])
    scheduler.submit(WorkItem("gone", keys, "m", 1, is_cancelled=lambda: True))
    assert scheduler.next_turn(now=5.0) == ([], [])
    assert len(scheduler) == 0


def test_nothing_overtakes_through_work_that_expired_while_it_waited() -> None:
    scheduler = Scheduler[str](100, 100)
    keys = frozenset([WorkKey(1, 0)])
    for name, deadline in (("a", 9.0), ("b", 5.0), ("c", 9.0)):
        scheduler.submit(WorkItem(name, keys, "m", 1, deadline))
    assert scheduler.next_turn(now=5.0) == (["a"], ["b"])
    assert scheduler.next_turn(now=5.0) == (["c"], [])


def test_what_is_left_can_be_taken_unrun() -> None:
    scheduler = queue_of(*of_client("a", 90, 90, 90))
    assert scheduler.next_turn(0.0).batch == ["a0"]
    scheduler.submit(item("b", [(1, 0)]))
    assert scheduler.clear() == ["a1", "a2", "b"]
    assert len(scheduler) == 0
    assert scheduler.next_turn(0.0) == ([], [])
