"""What steps cost, from the times of their launch."""

from octavo_server.stats import LaunchTimes, StageTimes


def test_a_steps_stages_follow_each_other_without_a_gap() -> None:
    times = LaunchTimes(began_at=10.0, staged_at=10.000_2, ran_at=10.003_2)
    times.num_entries, times.num_tokens = 3, 7
    assert times.of_step(arrived_at=9.999, answered_at=10.003_25) == StageTimes(
        queue_us=1000, batch_size=3, batch_tokens=7, copy_in_us=200, kernel_us=3000, copy_out_us=50
    )
