"""DivPrune against the plain loop in float64, and the picks that its description promises."""

import itertools

import pytest
import torch
from greedy_cases import (
    RING12,
    S16,
    S64,
    agreement,
    cases,
    choose,
    cosines,
    exact_features,
    order,
)

from foveate import Budget
from foveate.core.probes import Embeddings
from foveate.core.ranking import cosine_matrix
from foveate.methods import DivPrune
from tiny import visual_tokens


def distances(features):
    apart = [[1 - s for s in row] for row in cosines(features, features)]
    return [[0.0 if d < 1e-6 else d for d in row] for row in apart]


def reference(features, count):
    """Return the picks, the distance of each to the closest one before it, and by how much each was ahead."""
    apart = distances(features)
    n = len(features)
    picks, values, gaps = [], [], []
    for t in range(count):
        scores = {
            i: min(apart[i][j] for j in (picks if t else range(n)) if j != i) for i in range(n) if i not in picks
        }  # fmt: skip
        pick, gap = choose(scores)
        picks.append(pick)
        values.append(scores[pick])
        gaps.append(gap)
    return picks, values, gaps


def pick(features, count):
    return order(DivPrune(keep=count), {Embeddings(): features}, count)


@pytest.mark.parametrize(
    ("features", "picks", "gap"),
    [
        (S64, [3, 34, 35, 49, 20, 15, 60, 40], 1e-4),
        (S16, [0, 6, 3, 10, 9], 1e-4),
        (RING12, [5, 11, 8, 2], 1e-4),
    ],
    ids=["S64", "S16", "RING12"],
)
def test_published_picks(features, picks, gap):
    expected, _, gaps = reference(features, len(picks))
    assert expected == picks
    assert min(gaps) > gap / 2
    assert pick(features, len(picks)) == picks


def test_nearest_distances_of_the_ring():
    nearest = [min(d for j, d in enumerate(row) if j != i) for i, row in enumerate(distances(RING12))]
    assert nearest == pytest.approx(
        [.00745, .00745, .16133, .00548, .00548, .20136, .01837, .01837, .14283, .02563, .02563, .18085], abs=6e-6
    )  # fmt: skip
    assert pick(RING12, 1) == [5]


def test_random_inputs_give_the_picks_of_the_loop():
    compared = []
    for n, count, dtype, generator in cases(150, seed=1, largest=66):
        features = torch.randn(n, 6, generator=generator).to(dtype)
        picks, _, gaps = reference(features.tolist(), count)
        compared.append(agreement(pick(features, count), picks, gaps))
    assert sum(compared) > 0.9 * len(compared)


def test_exact_ties_go_to_the_lower_index():
    for n, count, dtype, generator in cases(100, seed=2, smallest=4, largest=60):
        features = exact_features(n, generator)
        assert pick(features.to(dtype), count) == reference(features.tolist(), count)[0]


def test_both_ends_of_the_closest_pair_tie(monkeypatch):
    """Two tokens tie if each is the other's nearest: the lower one is first, whatever order products are summed in."""
    noise = 2e-7 * (torch.rand(120, 120) - 0.5)
    monkeypatch.setattr("foveate.core.ranking.cosine_matrix", lambda features: cosine_matrix(features) + noise)
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        one = torch.randn(60, 300, generator=generator)
        apart = torch.tensor([0.03] + [0.01] * 59)[:, None]  # the first pair is the loosest
        features = torch.cat([one, one + apart * torch.randn(60, 300, generator=generator)])
        order = torch.randperm(120, generator=generator)
        assert pick(features[order], 1) == [min(order.tolist().index(0), order.tolist().index(60))]


def test_distances_to_the_picks_never_rise():
    for n, count, _, generator in cases(30, seed=3):
        features = torch.randn(n, 5, generator=generator)
        picks, apart = pick(features, count), distances(features.tolist())
        values = [
            min(apart[i][j] for j in picks[:t]) for t, i in enumerate(picks) if t
        ]  # fmt: skip
        assert all(a >= b - 1e-5 for a, b in itertools.pairwise(values))


def test_copies_wait_until_every_distinct_token_is_picked():
    generator = torch.Generator().manual_seed(4)
    distinct = torch.randn(9, 64, generator=generator)
    copies = torch.tensor([0, 3, 1, 2, 0, 4, 5, 6, 3, 7, 8, 8, 0, 1])
    picks = pick(distinct[copies], 14)
    assert sorted(copies[picks[:9]].tolist()) == list(range(9))
    assert picks[9:] == sorted(picks[9:])  # of those, all at distance zero, the lower index first


def test_the_selection_of_the_paper_spans_all_crops():
    reducer = DivPrune(keep=Budget(9, per="joint"))
    tokens = visual_tokens(reducer, [(0, [(6, 8), (8, 8)])])
    (chosen,) = reducer.select(tokens)
    both = torch.cat(tokens.planes[Embeddings()])
    places = torch.cat([crop.index for crop in tokens.spans[0].crops])
    assert chosen.kept.tolist() == sorted(places[reference(both.tolist(), 9)[0]].tolist())
