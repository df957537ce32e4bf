"""MMR against the plain loop in float64."""

import math

import pytest
import torch
from greedy_cases import S64, SALIENCY64, agreement, cases, choose, cosines, crop_batch, exact_features, order

from foveate.core.errors import FoveateError
from foveate.core.probes import Attention, Embeddings
from foveate.methods import MMR


def reference(features, saliency, count, balance=0.5):
    """Return the picks, and by how much each was ahead."""
    similarity = cosines(features, features)
    low, high = min(saliency), max(saliency)
    importance = [(a - low) / (high - low + 1e-6) if high > low else 1.0 for a in saliency]
    picks, gaps = [], []
    while len(picks) < count:
        scores = {
            i: balance * importance[i] - (1 - balance) * max(similarity[i][j] for j in picks)
            if picks
            else importance[i]
            for i in range(len(features))
            if i not in picks
        }
        pick, gap = choose(scores)
        picks.append(pick)
        gaps.append(gap)
    return picks, gaps


def pick(features, saliency, count, balance=0.5):
    planes = {Embeddings(): features, Attention(): saliency}
    return order(MMR(keep=count, balance=balance), planes, count)


def test_published_picks():
    picks = [54, 24, 2, 43, 46, 13, 62, 27]
    expected, gaps = reference(S64, SALIENCY64, 8)
    assert expected == picks
    assert min(gaps) > 1e-3
    assert pick(S64, SALIENCY64, 8) == picks


@pytest.mark.parametrize("balance", [0.5, 0.0, 0.8])
def test_random_inputs_give_the_reference_picks(balance):
    shares = []
    for n, count, dtype, generator in cases(60, seed=7):
        features = torch.randn(n, 6, generator=generator).to(dtype)
        saliency = torch.rand(n, generator=generator).to(dtype)
        expected, gaps = reference(features.tolist(), saliency.tolist(), count, balance)
        shares.append(agreement(pick(features, saliency, count, balance), expected, gaps))
    assert sum(shares) / len(shares) > 0.9


def test_exact_ties_go_to_the_earlier_token():
    for n, count, dtype, generator in cases(60, seed=8):
        features = exact_features(n, generator)
        for saliency in (torch.full((n,), 0.25), torch.randint(0, 2, (n,), generator=generator) / 4):
            expected, gaps = reference(features.tolist(), saliency.tolist(), count)
            assert agreement(pick(features.to(dtype), saliency.to(dtype), count), expected, gaps) == 1


def test_weight_one_ranks_by_attention():
    features, saliency = torch.randn(30, 6), torch.rand(30)
    assert pick(features, saliency, 9, 1.0) == saliency.argsort(descending=True)[:9].tolist()


def test_copies_and_zero_vectors():
    features = torch.eye(4).repeat(3, 1)
    features[8:] = 0
    picks = pick(features, torch.linspace(1, 0.9, 12), 11, 0.1)
    assert sorted(picks[:4]) == [0, 1, 2, 3]  # the first of each direction
    assert set(picks[4:8]) == {8, 9, 10, 11}  # then those that resemble nothing
    assert len(set(picks)) == 11


def test_what_is_no_number_comes_last():
    saliency = torch.rand(20)
    saliency[[3, 5]] = math.nan
    assert not {3, 5} & set(pick(torch.randn(20, 30), saliency, 8, 0.9))
    picks = pick(torch.eye(6), torch.full((6,), math.nan), 5)
    assert picks == [0, 1, 2, 3, 4]


def test_batch_equals_loop_over_crops():
    features, saliency = torch.randn(5, 33, 6), torch.rand(5, 33)
    together = MMR(keep=9).pick(crop_batch({Embeddings(): features, Attention(): saliency}), 9).tolist()
    assert together == [pick(f, a, 9) for f, a in zip(features, saliency, strict=True)]


@pytest.mark.parametrize("balance", [-0.1, 1.1])
def test_impossible_weights_are_refused(balance):
    with pytest.raises(FoveateError, match="balance"):
        MMR(keep=8, balance=balance)
