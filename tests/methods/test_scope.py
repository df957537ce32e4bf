"""SCOPE against the plain loop in float64, and the picks and gains that its description promises."""

import math

import pytest
import torch
from greedy_cases import (
    RING12,
    RING_SALIENCY,
    S64,
    SALIENCY64,
    agreement,
    cases,
    choose,
    cosines,
    exact_features,
    order,
)

from foveate.core.errors import FoveateError
from foveate.core.probes import Attention, Features
from foveate.methods import SCOPE


def reference(features, saliency, count, alpha=1.0):
    """Return the picks, the weighted gain of each, and by how much each was ahead."""
    similarity, n = cosines(features, features), len(features)
    covered = [0.0] * n
    picks, values, gaps = [], [], []
    for _ in range(count):
        left = [j for j in range(n) if j not in picks]
        gain = {j: math.fsum(max(0.0, similarity[i][j] - covered[i]) for i in range(n)) for j in left}
        adding = [j for j in left if gain[j] > 1e-6 * n]
        scores = {j: saliency[j] ** alpha * gain[j] for j in adding} or {j: saliency[j] for j in left}
        pick, gap = choose(scores)
        picks.append(pick)
        values.append(scores[pick])
        gaps.append(gap)
        covered = [max(covered[i], similarity[i][pick]) for i in range(n)]
    return picks, values, gaps


def pick(features, saliency, count, alpha=1.0):
    planes = {Features(): torch.as_tensor(features), Attention(): torch.as_tensor(saliency)}
    return order(SCOPE(keep=count, alpha=alpha), planes, count)


def test_published_picks_and_gains():
    picks, gains, gaps = reference(S64, SALIENCY64, 8)
    assert picks == [54, 24, 16, 2, 46, 62, 43, 5]
    assert gains == pytest.approx(
        [0.369435, 0.334465, 0.185877, 0.127562, 0.100751, 0.099076, 0.085477, 0.076730], abs=1e-6
    )
    assert min(gaps) == pytest.approx(8e-3, rel=0.05)
    assert pick(S64, SALIENCY64, 8) == picks
    assert pick(S64, [4 * a for a in SALIENCY64], 8) == picks


def test_published_set_of_sixteen():
    kept = [2, 5, 16, 19, 24, 26, 27, 29, 40, 41, 43, 46, 48, 54, 59, 62]
    assert sorted(reference(S64, SALIENCY64, 16)[0]) == kept
    assert sorted(pick(S64, SALIENCY64, 16)) == kept


def test_published_picks_of_coverage_alone():
    picks, gains, gaps = reference(S64, SALIENCY64, 8, alpha=0.0)
    assert picks == [63, 37, 61, 5, 2, 4, 23, 19]
    assert min(gaps) == pytest.approx(7e-5, rel=0.1)
    assert gains == sorted(gains, reverse=True)
    assert pick(S64, SALIENCY64, 8, alpha=0.0) == picks


def test_published_picks_on_the_ring():
    sums = [math.fsum(max(0.0, s) for s in row) for row in cosines(RING12, RING12)]
    assert sums == pytest.approx(
        [3.7267, 3.7311, 3.9459, 3.4905, 3.4743, 3.7594, 3.5113, 3.5595, 3.7717, 3.5034, 3.6078, 4.0267], abs=6e-5
    )
    picks, gains, _ = reference(RING12, RING_SALIENCY, 4)
    assert picks == [11, 3, 6, 0]
    assert gains == pytest.approx([0.805332, 0.516718, 0.381468, 0.071660], abs=1e-6)
    assert pick(RING12, RING_SALIENCY, 4) == picks


@pytest.mark.parametrize("alpha", [1.0, 0.0, 0.5, 2.0])
def test_random_inputs_give_the_picks_of_the_loop(alpha):
    compared = []
    for n, count, dtype, generator in cases(100, seed=1, largest=30):
        features = torch.randn(n, 6, generator=generator).to(dtype)
        saliency = torch.rand(n, generator=generator).to(dtype)
        picks, _, gaps = reference(features.tolist(), saliency.tolist(), count, alpha)
        compared.append(agreement(pick(features, saliency, count, alpha), picks, gaps))
    assert sum(compared) > 0.9 * len(compared)


def test_exact_ties_go_to_the_lower_index():
    for n, count, dtype, generator in cases(100, seed=2, smallest=4, largest=30):
        features = exact_features(n, generator).to(dtype)
        saliency = (torch.randint(0, 4, (n,), generator=generator) / 4).to(dtype)
        assert pick(features, saliency, count) == reference(features.tolist(), saliency.tolist(), count)[0]


def test_once_all_is_covered_the_most_salient_follow():
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(3, 301, generator=generator)[torch.arange(150) % 3]
    saliency = torch.rand(150, generator=generator)
    picks = pick(features, saliency, 150)
    assert len({i % 3 for i in picks[:3]}) == 3
    rest = saliency[picks[3:]].tolist()
    assert rest == sorted(rest, reverse=True)


@pytest.mark.parametrize("alpha", [-0.5, math.inf, math.nan])
def test_impossible_parameters_are_refused(alpha):
    with pytest.raises(FoveateError, match="alpha"):
        SCOPE(keep=8, alpha=alpha)
