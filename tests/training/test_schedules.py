import json
import math

import pytest

from training.schedules import Cosine, LearningRate, WarmupCosine, WarmupPlateau


def test_a_cosine_goes_from_start_to_end_and_stays_there() -> None:
    schedule = Cosine(start=1.0, end=1 / 16, steps=100)
    assert schedule.at(0) == 1.0
    assert schedule.at(50) == pytest.approx((1 + 1 / 16) / 2)
    assert schedule.at(25) == pytest.approx(1 / 16 + 15 / 16 * (1 + math.cos(math.pi / 4)) / 2)
    assert schedule.at(100) == schedule.at(10**9) == 1 / 16


def test_a_rising_cosine_rises() -> None:
    values = [Cosine(start=0.0, end=6.6, steps=10).at(step) for step in range(12)]
    assert values == sorted(values)
    assert values[0] == 0.0
    assert values[-1] == 6.6


def test_warm_up_reaches_the_peak_with_its_last_step_and_the_cosine_ends_at_final() -> None:
    schedule = WarmupCosine(peak=1.0, warmup=4, steps=14, final=0.1)
    assert [schedule.at(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule.at(9) == pytest.approx(0.55)
    assert schedule.at(14) == schedule.at(99) == pytest.approx(0.1)


@pytest.mark.parametrize("warmup", [-1, 10, 11])
def test_a_warm_up_longer_than_the_run_is_refused(warmup: int) -> None:
    with pytest.raises(ValueError, match="warmup"):
        WarmupCosine(peak=1.0, warmup=warmup, steps=10)


def test_the_plateau_schedule_of_the_paper_ends_at_a_thirty_second_of_its_peak() -> None:
    schedule = WarmupPlateau()
    assert schedule.at(0) == pytest.approx(4.5e-4 / 5000)
    assert schedule.at(4999) == schedule.at(400_000) == 4.5e-4
    assert schedule.at(400_000, schedule.halvings) == pytest.approx(4.5e-4 / 32)


def plateau_rate() -> LearningRate:
    return LearningRate(WarmupPlateau(peak=1.0, warmup=2, halvings=2, window=3, patience=2, threshold=0.01))


def test_the_rate_stays_while_the_loss_falls_and_halves_when_it_stops_falling() -> None:
    rate = plateau_rate()
    for step in range(30):
        rate.observe(step, 10.0 - 0.2 * step)
    assert rate.at(30) == 1.0
    for step in range(30, 38):  # the end of a window that is still progress, and two that are not
        assert rate.at(step) == 1.0
        rate.observe(step, 4.2)
    assert rate.at(38) == 0.5


def test_the_rate_is_halved_no_oftener_than_allowed() -> None:
    rate = plateau_rate()
    for step in range(200):
        rate.observe(step, 1.0)
    assert rate.at(200) == 0.25


def test_losses_of_the_warm_up_do_not_count() -> None:
    rate = plateau_rate()
    rate.observe(0, -100.0)
    rate.observe(1, -100.0)
    for step in range(2, 8):
        rate.observe(step, 5.0 - step / 10)
    assert rate.best < 5
    assert rate.best > 0
    assert rate.n_halvings == 0


def test_a_rate_restored_from_json_goes_on_like_the_one_that_was_saved() -> None:
    losses = [3.0, 2.9, 2.8, *[2.8] * 40]
    straight, resumed = plateau_rate(), plateau_rate()
    rates = []
    for step, loss in enumerate(losses):
        straight.observe(step, loss)
        if step % 7 == 0:  # also before the first window, when the best loss is infinite
            saved = json.loads(json.dumps(resumed.state()))
            resumed = plateau_rate()
            resumed.restore(saved)
        resumed.observe(step, loss)
        rates.append((straight.at(step), resumed.at(step)))
    assert all(a == b for a, b in rates)
    assert rates[-1] == (0.25, 0.25)


def test_losses_observed_late_but_in_time_decide_as_if_observed_at_once():
    schedule = WarmupPlateau(peak=1.0, warmup=3, window=4, patience=1, halvings=2)
    losses = [5.0, 5.0, 5.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]
    at_once, late = LearningRate(schedule), LearningRate(schedule)
    waiting = []
    for step, loss in enumerate(losses):
        assert late.at(step) == at_once.at(step)
        at_once.observe(step, loss)
        waiting.append((step, loss))
        if len(waiting) >= late.n_undecided(waiting[0][0]):
            for seen in waiting:
                late.observe(*seen)
            waiting.clear()
    assert late.state() != LearningRate(schedule).state()
    assert late.n_halvings == at_once.n_halvings > 0
