"""DART before the LLM against the plain loop in float64, and the picks that its description promises."""

import itertools
import math

import pytest
import torch
from greedy_cases import S16, S64, agreement, cases, cosines, exact_features, order

from foveate.core.errors import FoveateError
from foveate.core.probes import Embeddings
from foveate.methods import DART


def reference(embeddings, count, pivots=4):
    """Return the picks, and for each the distance to what came after it in the same ranking."""
    size = [math.fsum(abs(x) for x in row) for row in embeddings]
    ranking = sorted(range(len(size)), key=lambda i: -size[i])
    chosen = ranking[: min(pivots, count)]
    picks = list(chosen)
    gaps = [apart(size[a], size[b]) for a, b in itertools.pairwise(ranking)][: len(picks)]
    quota = math.ceil((count - len(picks)) / pivots)
    for pivot in chosen:
        (row,) = cosines([embeddings[pivot]], embeddings)
        likeness = {i: s for i, s in enumerate(row) if i not in picks}
        ranking = sorted(likeness, key=lambda i: likeness[i])
        added = ranking[: min(quota, count - len(picks))]
        gaps += [apart(likeness[b], likeness[a]) for a, b in zip(ranking, [*ranking[1:], ranking[-1]], strict=True)][
            : len(added)
        ]
        picks += added
    return picks, gaps


def apart(high, low):
    """How far two values are apart; equal ones are in a certain order."""
    return abs(high - low) if abs(high - low) > 1e-12 else math.inf


def pick(embeddings, count, pivots=4):
    return order(DART(keep=count, pivots=pivots), {Embeddings(): embeddings}, count)


def test_published_picks():
    picks = [29, 8, 32, 55, 16, 24, 63, 45, 37, 53, 21, 54, 5, 6, 14, 61]
    expected, gaps = reference(S64, 16)
    assert expected == picks
    assert min(gaps) > 1e-4
    assert min(gaps[6::3]) == pytest.approx(0.033, abs=5e-4)  # where each of four pivots has its three
    assert pick(S64, 16) == picks


def test_published_picks_of_two_pivots():
    picks = [8, 14, 6, 15, 1, 0, 2]
    expected, gaps = reference(S16, 7, pivots=2)
    assert expected == picks
    assert min(gaps[4], gaps[6]) == pytest.approx(0.011, abs=5e-4)
    assert pick(S16, 7, pivots=2) == picks


@pytest.mark.parametrize("pivots", [1, 3, 4, 8])
def test_random_inputs_give_the_picks_of_the_loop(pivots):
    compared = []
    for n, count, dtype, generator in cases(100, seed=pivots, largest=66):
        embeddings = torch.randn(n, 7, generator=generator).to(dtype)
        picks, gaps = reference(embeddings.tolist(), count, pivots)
        compared.append(agreement(pick(embeddings, count, pivots), picks, gaps, clear=1e-5))
    assert sum(compared) > 0.9 * len(compared)


def test_exact_ties_go_to_the_lower_index():
    for n, count, dtype, generator in cases(100, seed=9, smallest=4, largest=60):
        embeddings = exact_features(n, generator)  # all of the same norm
        assert pick(embeddings.to(dtype), count) == reference(embeddings.tolist(), count)[0]


def test_pivots_are_kept_and_few_tokens_are_those_with_the_largest_norms():
    sizes = torch.tensor(S64).abs().sum(dim=1)
    for count in range(1, 30):
        picks = pick(S64, count)
        assert picks[:4] == sizes.argsort(descending=True)[: min(4, count)].tolist()


def test_norms_choose_pivots_and_nothing_else():
    embeddings = torch.tensor(S64)
    longer = embeddings.clone()
    longer[40] *= 50
    assert pick(longer, 16)[0] == 40
    longer = embeddings.clone()
    longer[29] *= 50  # already the first pivot
    assert pick(longer, 16) == pick(S64, 16)


@pytest.mark.parametrize("pivots", [0, -4])
def test_impossible_parameters_are_refused(pivots):
    with pytest.raises(FoveateError, match="pivot"):
        DART(keep=8, pivots=pivots)
