"""Stage I of TOPS against the plain loop in float64, and the picks that its description promises."""

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
from foveate.core.probes import Attention, Embeddings
from foveate.methods import TOPS


def reference(embeddings, saliency, count, alpha=0.5, lam=0.5, share=True):
    """Return the picks, and by how much each was ahead, as a share of its score or as it is."""
    similarity, n = cosines(embeddings, embeddings), len(embeddings)
    first, gap = choose(dict(enumerate(saliency)))
    picks, gaps = [first], [gap]
    closest = similarity[first]
    while len(picks) < count:
        left = [i for i in range(n) if i not in picks]
        terms = [
            (1.0, {i: saliency[i] for i in left}, 0.0),
            (alpha, {i: 1 - closest[i] for i in left}, 1e-6),
            (lam, {i: math.fsum(max(0.0, similarity[i][j] - closest[j]) for j in left) for i in left}, 1e-6 * n),
        ]
        scores = dict.fromkeys(left, 0.0)
        for weight, values, least in terms:
            mean = math.fsum(values.values()) / len(left)
            if mean > least:
                for i in left:
                    scores[i] += weight * values[i] / mean
        pick, gap = choose(scores)
        picks.append(pick)
        gaps.append(gap if share else gap * scores[pick])
        closest = [max(c, s) for c, s in zip(closest, similarity[pick], strict=True)]
    return picks, gaps


def pick(embeddings, saliency, count, **config):
    planes = {Embeddings(): torch.as_tensor(embeddings), Attention(): torch.as_tensor(saliency)}
    return order(TOPS(keep=count, **config), planes, count)


def test_published_picks():
    picks, gaps = reference(S64, SALIENCY64, 8)
    assert picks == [54, 24, 2, 13, 46, 43, 62, 16]
    assert min(gaps) > 1e-4
    assert min(reference(S64, SALIENCY64, 8, share=False)[1][1:]) == pytest.approx(3e-3, rel=0.1)
    assert pick(S64, SALIENCY64, 8) == picks


def test_published_picks_on_the_ring():
    picks, gaps = reference(RING12, RING_SALIENCY, 5, share=False)
    assert picks == [11, 3, 6, 9, 0]
    assert min(gaps[1:]) == pytest.approx(0.19, abs=6e-3)
    assert pick(RING12, RING_SALIENCY, 5) == [11, 3, 6, 9, 0]


@pytest.mark.parametrize(("alpha", "lam"), [(0.5, 0.5), (0.0, 0.5), (0.5, 0.0), (2.0, 0.3), (0.3, 2.0)])
def test_random_inputs_give_the_picks_of_the_loop(alpha, lam):
    compared = []
    for n, count, dtype, generator in cases(100, seed=1, largest=24):
        embeddings = torch.randn(n, 6, generator=generator).to(dtype)
        saliency = torch.rand(n, generator=generator).to(dtype)
        picks, gaps = reference(embeddings.tolist(), saliency.tolist(), count, alpha, lam)
        compared.append(agreement(pick(embeddings, saliency, count, diversity=alpha, coverage=lam), picks, gaps))
    assert sum(compared) > 0.9 * len(compared)


def test_exact_ties_go_to_the_lower_index():
    compared = []
    for n, count, dtype, generator in cases(100, seed=2, smallest=4, largest=30):
        features = exact_features(n, generator).to(dtype)
        saliency = (torch.randint(0, 4, (n,), generator=generator) / 4).to(dtype)
        picks, gaps = reference(features.tolist(), saliency.tolist(), count)
        compared.append(agreement(pick(features, saliency, count), picks, gaps))
    assert sum(compared) > 0.95 * len(compared)


def test_terms_without_a_mean_drop_out():
    generator = torch.Generator().manual_seed(3)
    saliency = torch.rand(20, generator=generator)
    copies = torch.randn(1, 50, generator=generator).expand(20, -1)
    assert pick(copies, saliency, 20) == saliency.argsort(descending=True).tolist()
    # Without any attention the first token is the lowest one, and the others follow by the other terms.
    features = torch.randn(20, 8, generator=generator)
    assert pick(features, torch.zeros(20), 9) == reference(features.tolist(), [0.0] * 20, 9)[0]
    assert pick(copies, torch.zeros(20), 9) == list(range(9))


@pytest.mark.parametrize("name", ["diversity", "coverage"])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_impossible_parameters_are_refused(name, value):
    with pytest.raises(FoveateError, match=name):
        TOPS(keep=8, **{name: value})
