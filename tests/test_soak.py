"""What the soak (tests/performance/soak.py) calls growth: a leak is seen, and what every release brings is not."""

import random

import pytest

from tests.performance.soak_verdict import judge

WARM_UP, CYCLE = 1200.0, 900.0


def samples(*, leak_per_hour=0.0, minutes=120, jump_at=None):
    """One each 10 s. Memory climbs by 10 MB after each load, every 300 s, and every third release is larger."""
    noise, found = random.Random(0), []  # noqa: S311 - figures, no secrets
    for place in range(6 * minutes):
        t = 10.0 * place
        turn, since = divmod(t, 300)
        pss = 500e6 + 10e6 * min(1, since / 100) + (30e6 if turn % 3 == 2 else 0) + noise.gauss(0, 1e6)
        pss += 500e6 * leak_per_hour * t / 3600
        shm = 4_000_000 + (200_000 if jump_at is not None and t > jump_at else 0)
        busy = since < 40 and turn > 0
        found.append(
            {
                "t": t,
                "at_rest": not busy,
                "models": 4 if busy and since > 20 else 2,
                "pss_bytes": pss * (2 if busy else 1),
                "descriptors": 150,
                "shm_bytes": shm,
                "shm_files": 2,
            }
        )
    return found


def judged(found):
    return judge(found, warm_up_s=WARM_UP, cycle_s=CYCLE)


def test_what_every_release_brings_is_no_growth():
    growth = judged(samples())
    assert all(abs(one["growth"]) < 0.01 for one in growth.values())


@pytest.mark.parametrize("per_hour", [0.04, 0.2])
def test_a_leak_is_growth(per_hour):
    # The medians lie 55 minutes apart.
    assert judged(samples(leak_per_hour=per_hour))["pss_bytes"]["growth"] == pytest.approx(55 / 60 * per_hour, rel=0.25)


def test_shared_memory_that_stays_is_growth():
    growth = judged(samples(jump_at=4500))
    assert growth["shm_bytes"]["growth"] == pytest.approx(0.05, abs=0.001)
    assert growth["descriptors"]["growth"] == 0


def test_what_came_before_the_warm_up_ended_counts_for_nothing():
    assert judged(samples(jump_at=600))["shm_bytes"]["growth"] == 0


def test_too_few_samples_are_no_verdict():
    assert judged(samples(minutes=21)) == {}
    assert judged([]) == {}
