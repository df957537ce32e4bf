from __future__ import annotations

import math
import random

import pytest

from foveate.tune.bounds import design_effect, disagreement, drop, middle


def pmf(n: int, k: int, p: float) -> float:
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


def apart(n: int) -> range:
    """Clusters of one prompt each."""
    return range(n)


def test_bounds_of_a_share_are_those_of_clopper_and_pearson():
    none = disagreement([False] * 50, apart(50), 0.95)
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(1 - 0.05 ** (1 / 50), abs=1e-9)
    every = disagreement([True] * 50, apart(50), 0.95)
    assert (every.value, every.high) == (1.0, 1.0)
    assert every.low == pytest.approx(0.05 ** (1 / 50), abs=1e-9)
    half = disagreement([True] * 5 + [False] * 5, apart(10), 0.975)
    assert (half.low, half.high) == pytest.approx((0.18709, 0.81291), abs=1e-5), "as tables have it"


@pytest.mark.parametrize("p", [0.01, 0.05, 0.3, 0.9])
def test_bounds_of_a_share_hold_as_often_as_they_say(p: float) -> None:
    n = 40
    found = [disagreement([True] * k + [False] * (n - k), apart(n), 0.95) for k in range(n + 1)]
    assert sum(pmf(n, k, p) for k in range(n + 1) if found[k].high >= p) >= 0.95
    assert sum(pmf(n, k, p) for k in range(n + 1) if found[k].low <= p) >= 0.95


def test_bounds_of_a_drop_by_hand():
    found = drop([1] * 10 + [-1] * 5 + [0] * 85, apart(100), 0.95)
    half = 1.6448536 * math.sqrt((17 / 102 - (5 / 102) ** 2) / 102)
    assert found.value == pytest.approx(0.05)
    assert (found.low, found.high) == pytest.approx((5 / 102 - half, 5 / 102 + half), abs=1e-6)
    assert 0 < drop([0] * 100, apart(100), 0.95).high < 0.03


def test_bounds_of_a_drop_hold_about_as_often_as_they_say():
    draw, held = random.Random(0), 0
    for _ in range(2000):
        lost = draw.choices([1, -1, 0], [0.06, 0.02, 0.92], k=80)
        held += drop(lost, apart(80), 0.95).high >= 0.04
    assert held / 2000 > 0.93


@pytest.mark.parametrize("n", [5, 9, 60, 301])
def test_bounds_of_a_median_hold_as_often_as_they_say(n: int) -> None:
    found = middle(list(range(n)), 0.95)
    beyond = int(found.low)
    assert sum(pmf(n, k, 0.5) for k in range(beyond + 1)) <= 0.05, "so few lie below the median by chance"
    assert sum(pmf(n, k, 0.5) for k in range(beyond + 2)) > 0.05, "no bound is wider than needed"
    assert found.high == n - 1 - beyond
    assert found.value == (n - 1) / 2


def test_questions_about_one_image_count_for_less():
    values = [1.0, 1.0, 0.0, 0.0] * 20
    pairs = [i // 2 for i in range(80)]
    assert design_effect(values, pairs) == pytest.approx(2, rel=0.02)
    assert design_effect(values, apart(80)) == 1.0
    assert design_effect([0.0] * 80, pairs) == 1.0
    assert design_effect([1.0, 0.0] * 40, [0] * 80) == 80, "one image is one draw"
    differs = [v == 1.0 for v in values]
    together, alone = disagreement(differs, pairs, 0.95), disagreement(differs, apart(80), 0.95)
    assert together.value == alone.value == 0.5
    assert together.low < alone.low < alone.high < together.high
    assert drop([int(v) for v in values], pairs, 0.95).high > drop([int(v) for v in values], apart(80), 0.95).high
