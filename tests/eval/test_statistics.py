from __future__ import annotations

import numpy as np
import pytest

from foveate.eval.statistics import holm, relative_average, sign_flip


def test_relative_average_weighs_kinds_alike_and_skips_what_was_not_asked():
    unpruned = np.array([[10, 1, 0], [10, 1, 0]])
    right = np.array([[10, 0, 0], [10, 1, 0]])
    found = relative_average(right, unpruned)
    assert found["average"] == 75.0  # the mean of 100 and 50, though the second kind has few questions
    assert found["error"] > 0


def test_relative_average_is_sure_of_equal_answers():
    unpruned = np.random.default_rng(0).integers(1, 4, (30, 3))
    assert relative_average(unpruned, unpruned) == {"average": 100.0, "error": 0.0}


def test_error_of_the_relative_average_shrinks_with_the_images():
    draws = np.random.default_rng(1)
    unpruned = np.full((400, 2), 3)
    right = draws.binomial(3, 0.5, (400, 2))
    few, many = (relative_average(right[:n], unpruned[:n])["error"] for n in (100, 400))
    assert many == pytest.approx(few / 2, rel=0.25)
    # each kind: 3 * 400 answers with a spread of 0.5; the mean of two kinds
    assert many == pytest.approx(100 * 0.5 / np.sqrt(1200) / np.sqrt(2), rel=0.15)


def test_sign_flip_counts_the_flips_that_are_as_extreme():
    assert sign_flip(np.ones(8)) == pytest.approx(2 / 256, abs=0.003)
    assert sign_flip(np.zeros(8)) == 1.0
    assert sign_flip(np.array([3, -3, 1, -1])) == 1.0
    assert sign_flip(-np.ones(8)) == sign_flip(np.ones(8))


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
