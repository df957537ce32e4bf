"""AgilePruner against the plain walk in float64."""

import math

import pytest
import torch
from greedy_cases import S16, S64, cases, cosines, crop_batch, exact_features, order

from foveate.core.errors import FoveateError
from foveate.core.probes import Attention, Features
from foveate.methods import AgilePruner
from foveate.methods.agilepruner import effective_rank


def rank_of(features):
    values = torch.linalg.svdvals(torch.tensor(features, dtype=torch.float64)).tolist()
    shares = [v / math.fsum(values) for v in values if v > 0]
    return math.exp(-math.fsum(p * math.log(p) for p in shares)) if shares else 1.0


def reference(features, saliency, count, step=0.01, limit=0.3, typical=0.5):
    """Return the kept tokens, how many of them passed, and the smallest distance from a threshold."""
    similarity = cosines(features, features)
    complexity = rank_of(features) / (typical * min(len(features), len(features[0])))
    by_saliency = sorted(range(len(saliency)), key=lambda i: -saliency[i])
    kept, gap = [], math.inf
    for place, i in enumerate(by_saliency):
        if len(kept) == count:
            break
        nearest = min((1 - similarity[i][j] for j in kept), default=math.inf)
        asked = min(limit, step * place * complexity)
        gap = min(gap, abs(nearest - asked))
        if nearest >= asked:
            kept.append(i)
    passed = len(kept)
    kept += [i for i in by_saliency if i not in kept][: count - passed]
    return kept, passed, gap


def pick(features, saliency, count, **config):
    return order(AgilePruner(keep=count, **config), {Features(): features, Attention(): saliency}, count)


@pytest.mark.parametrize(("features", "rank"), [(S16, 7.736509), (S64, 7.963633)], ids=["S16", "S64"])
def test_published_effective_ranks(features, rank):
    assert rank_of(features) == pytest.approx(rank, abs=1e-6)
    assert effective_rank(torch.tensor([features]).double()).tolist() == pytest.approx([rank], abs=1e-6)


def test_effective_rank_counts_directions():
    features = torch.zeros(4, 9, 6)
    features[0, :, :3] = torch.eye(3).repeat(3, 1)
    features[1, :, 2] = 5
    features[3] = math.nan
    assert effective_rank(features).tolist() == pytest.approx([3, 1, 1, 1])


@pytest.mark.parametrize("config", [{}, {"limit": 1.0, "step": 0.05}, {"limit": 0.9, "typical": 1.0}], ids=str)
def test_random_inputs_give_the_reference_selection(config):
    compared = filled = 0
    for n, count, dtype, generator in cases(80, seed=13):
        features = torch.randn(n, 4, generator=generator).to(dtype)
        saliency = torch.rand(n, generator=generator).to(dtype)
        kept, passed, gap = reference(features.tolist(), saliency.tolist(), count, **config)
        if gap < 1e-5:
            continue
        compared += 1
        filled += passed < count
        assert pick(features, saliency, count, **config) == kept, (n, count)
    assert compared > 70
    assert 10 < filled < compared - 10  # both ends of the walk occur


def test_exact_ties_go_to_the_earlier_token():
    """Cosines in quarters, and a limit between them."""
    for n, count, dtype, generator in cases(60, seed=14):
        features = exact_features(n, generator)
        saliency = torch.randint(0, 3, (n,), generator=generator) / 4
        kept, _, gap = reference(features.tolist(), saliency.tolist(), count, step=1.0, limit=0.6)
        assert gap > 1e-4
        assert pick(features.to(dtype), saliency.to(dtype), count, step=1.0, limit=0.6) == kept


def test_simple_pictures_go_by_attention_and_complex_ones_by_diversity():
    generator = torch.Generator().manual_seed(15)
    saliency = torch.linspace(1, 0.1, 60)
    base = torch.randn(15, 40, generator=generator).repeat_interleave(4, dim=0)
    complex_ = base + 0.35 * torch.randn(60, 40, generator=generator)
    simple = torch.ones(60, 40) + 0.001 * complex_
    config = {"step": 0.01, "limit": 0.5, "typical": 0.9}
    assert effective_rank(simple[None]) < 0.2 * effective_rank(complex_[None])
    kept = {name: pick(x, saliency, 12, **config) for name, x in (("simple", simple), ("complex", complex_))}
    assert sorted(kept["simple"]) == list(range(12))  # nothing is apart: filled up by attention
    assert len({i // 4 for i in kept["complex"]}) > len({i // 4 for i in kept["simple"]}) == 3


def test_without_step_or_limit_attention_decides():
    features, saliency = torch.randn(30, 6), torch.rand(30)
    expected = saliency.argsort(descending=True)[:9].tolist()
    assert pick(features, saliency, 9, step=0.0) == expected
    features[:] = features[0]
    assert pick(features, saliency, 9) == expected


def test_what_is_no_number_comes_last():
    saliency = torch.rand(20)
    saliency[[3, 5]] = math.nan
    kept = pick(torch.randn(20, 30), saliency, 18)
    assert set(kept) == set(range(20)) - {3, 5}
    assert pick(torch.zeros(6, 4), torch.full((6,), math.nan), 4) == [0, 1, 2, 3]


def test_batch_equals_loop_over_crops():
    features, saliency = torch.randn(5, 33, 6), torch.rand(5, 33)
    reducer = AgilePruner(keep=9, limit=0.8)
    together = reducer.pick(crop_batch({Features(): features, Attention(): saliency}), 9).tolist()
    assert together == [pick(f, a, 9, limit=0.8) for f, a in zip(features, saliency, strict=True)]


@pytest.mark.parametrize("config", [{"step": -0.1}, {"limit": 2.1}, {"limit": -0.1}, {"typical": 0}, {"typical": 1.5}])
def test_impossible_parameters_are_refused(config):
    with pytest.raises(FoveateError, match=next(iter(config))):
        AgilePruner(keep=8, **config)
