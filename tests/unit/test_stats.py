"""What steps cost, from the times of their launch, and what that adds up to."""

import pytest

from octavo_server.stats import Durations, LaunchStats, LaunchTimes, LaunchTotals, StageTimes


def launch(num_entries: int, num_steps: int = 1) -> LaunchTimes:
    """Return a launch of 0.2 ms copy in and 3 ms in the backend, whose steps waited 1 ms."""
    return LaunchTimes(
        began_at=10.0,
        staged_at=10.000_2,
        ran_at=10.003_2,
        num_steps=num_steps,
        num_entries=num_entries,
        num_tokens=2 * num_entries,
        arrivals=[9.999] * num_steps,
        cache_bytes=1000 * num_entries,
    )


def test_a_steps_stages_follow_each_other_without_a_gap() -> None:
    times = launch(num_entries=3)
    assert times.of_step(arrived_at=9.999, answered_at=10.003_25) == StageTimes(
        queue_us=1000, batch_size=3, batch_tokens=6, copy_in_us=200, kernel_us=3000, copy_out_us=50
    )


@pytest.mark.parametrize(
    ("num_entries", "max_batch_size"),
    [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (64, 64), (65, 128), (4096, 4096)],
)
def test_a_launch_counts_for_the_next_power_of_two(num_entries: int, max_batch_size: int) -> None:
    totals = LaunchTotals()
    totals.add(launch(num_entries), num_appended_tokens=0)
    (stats,) = totals.stats()
    assert (stats.max_batch_size, stats.num_entries) == (max_batch_size, num_entries)


def test_launches_add_up_by_batch_size() -> None:
    totals = LaunchTotals()
    for num_entries, num_steps in ((3, 2), (1, 1), (4, 3)):
        of_size = totals.add(launch(num_entries, num_steps), num_appended_tokens=num_entries)
        of_size.copy_out_s += 0.000_05
    assert totals.num_appended_tokens == 8
    assert totals.stats() == (
        LaunchStats(1, 1, 1, 1, 2, 1000, 200, 3000, 50, 1000),
        LaunchStats(4, 2, 5, 7, 14, 5000, 400, 6000, 100, 7000),
    )


def test_durations_are_counted_by_powers_of_two_of_microseconds() -> None:
    totals = LaunchTotals()
    for num_steps in (1, 2):
        totals.add(launch(4, num_steps), 0)
    totals.add(LaunchTimes(10.0, 10.0, 10.000_000_5, 1, 1, 1, [10.0]), 0)
    # Waits of 1000 us and none; kernels of 3000 us and half a one.
    assert nonzero(totals.queue) == {10: 3, 0: 1}
    assert nonzero(totals.kernel) == {12: 2, 0: 1}
    assert totals.queue.total_s == pytest.approx(0.003)
    assert totals.kernel.total_s == pytest.approx(0.006_000_5)


def nonzero(durations: Durations) -> dict[int, int]:
    return {i: count for i, count in enumerate(durations.counts) if count}
