"""CDPruner against the published loop in float64, and the picks that its description promises."""

import itertools
import math

import pytest
import torch
from greedy_cases import S64, agreement, cases, choose, cosines, crop_batch, order, text

from foveate.core.errors import FoveateError
from foveate.core.probes import Embeddings
from foveate.methods import CDPruner
from foveate.methods.cdpruner import most_diverse, weights

HAND = [[1, 0, 0], [0.8, 0.6, 0], [0, 1, 0], [0, 0, 1], [0.6, 0, 0.8], [0, 0.6, 0.8]]
HAND_RELEVANCE = [1, 0.9, 0.7, 0.5, 0.8, 0.2]


def normalised(relevance):
    low, high = min(relevance), max(relevance)
    return [(x - low + 1e-6) / (high - low) if high - low > 1e-6 else 1.0 for x in relevance]


def mean_cosine(embeddings, words):
    return [math.fsum(row) / len(row) for row in cosines(embeddings, words)] if words else [0.0] * len(embeddings)


def kernel(embeddings, r):
    similarity = cosines(embeddings, embeddings)
    return [[r[i] * s * r[j] for j, s in enumerate(row)] for i, row in enumerate(similarity)]


def reference(embeddings, r, count):
    """Return the picks, what each adds to the determinant as a factor, and by how much each was ahead."""
    k, n = kernel(embeddings, r), len(embeddings)
    d = [k[i][i] for i in range(n)]
    rows, picks, values, gaps = [], [], [], []
    for _ in range(count):
        left = [i for i in range(n) if i not in picks]
        independent = [i for i in left if d[i] > 1e-10 * r[i] ** 2]
        pick, gap = choose({i: d[i] for i in independent} if independent else {i: r[i] for i in left})
        picks.append(pick)
        values.append(d[pick])
        # Where two orders of summation may disagree on whether any token is independent, nothing is certain.
        unclear = 1e-12 < max(d[i] / r[i] ** 2 for i in left) < 1e-8
        gaps.append(0.0 if unclear else gap)
        scale = math.sqrt(max(d[pick], 1e-12))
        row = [(k[pick][i] - math.fsum(x[pick] * x[i] for x in rows)) / scale for i in range(n)]
        rows.append(row)
        d = [x - e * e for x, e in zip(d, row, strict=True)]
    return picks, values, gaps


def determinant(matrix):
    return float(torch.linalg.det(torch.tensor(matrix, dtype=torch.float64)))


def pick(embeddings, r, count):
    """Pick with the relevance given, whatever its sign or scale."""
    similarity = torch.tensor([cosines(embeddings, embeddings)], dtype=torch.float64)
    return most_diverse(similarity, torch.tensor([r], dtype=torch.float64), count)[0].tolist()


def test_published_picks_by_hand():
    picks, factors, _ = reference(HAND, HAND_RELEVANCE, 3)
    assert picks == [0, 2, 4]
    assert factors == pytest.approx([1, 0.49, 0.4096])
    assert pick(HAND, HAND_RELEVANCE, 3) == picks
    k, greedy = kernel(HAND, HAND_RELEVANCE), []
    for _ in range(3):
        greedy.append(
            max(
                (i for i in range(6) if i not in greedy),
                key=lambda i: determinant([[k[a][b] for b in [*greedy, i]] for a in [*greedy, i]]),
            )
        )
    assert greedy == picks


@pytest.mark.parametrize(
    ("sign", "theta", "picks"),
    [
        (-1, None, [29, 21, 39, 20, 30, 1]),
        (1, None, [24, 16, 61, 27, 23, 52]),
        (-1, 0.5, [29, 50, 20, 30, 35, 13]),
    ],
)
def test_published_picks(sign, theta, picks):
    """CLIP's relevance is negated, that of other models is not."""
    relevance = [sign * x for x in mean_cosine(S64, text(1))]
    r = normalised(relevance)
    if theta is not None:
        r = [math.exp(theta / (2 * (1 - theta)) * x) for x in r]
    expected, factors, gaps = reference(S64, r, 6)
    assert expected == picks
    assert min(gaps) > 1e-3
    if (sign, theta) == (-1, None):
        assert factors == pytest.approx([1.000001, 0.530162, 0.507730, 0.431280, 0.394805, 0.362115], abs=1e-6)
    weight = weights(torch.tensor([relevance], dtype=torch.float64), theta)
    assert pick(S64, weight[0].tolist(), 6) == picks
    if sign == 1:
        assert order(CDPruner(keep=6, theta=theta), {Embeddings(): S64}, 6, text(1)) == picks


@pytest.mark.parametrize("theta", [None, 0.0, 0.5, 0.9])
def test_random_inputs_give_the_picks_of_the_loop(theta):
    compared = []
    for n, count, dtype, generator in cases(100, seed=1, smallest=3):
        embeddings = torch.randn(n, 8 + n // 2, generator=generator).to(dtype)
        words = torch.randn(n % 4, embeddings.shape[1], generator=generator).to(dtype)  # none in every fourth case
        r = normalised(mean_cosine(embeddings.tolist(), words.tolist()))
        if theta is not None:
            r = [math.exp(theta / (2 * (1 - theta)) * x) for x in r]
        picks, _, gaps = reference(embeddings.tolist(), r, count)
        got = order(CDPruner(keep=count, theta=theta), {Embeddings(): embeddings}, count, words)
        compared.append(agreement(got, picks, gaps, clear=1e-8))
    assert sum(compared) > 0.99 * len(compared)


def test_nearly_dependent_tokens_are_picked_exactly():
    """From some pick on, what is left of every token is less than float32 resolves; the greedy rule still decides."""
    compared = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        embeddings = torch.randn(40, 6, generator=generator) @ torch.randn(6, 48, generator=generator)
        embeddings += 1e-3 * torch.randn(40, 48, generator=generator)
        words = torch.randn(3, 48, generator=generator)
        r = normalised(mean_cosine(embeddings.tolist(), words.tolist()))
        picks, factors, gaps = reference(embeddings.tolist(), r, 30)
        assert factors[6] < 1e-5
        got = order(CDPruner(keep=30), {Embeddings(): embeddings}, 30, words)
        compared.append(agreement(got, picks, gaps, clear=1e-7))
    assert sum(compared) > 0.99 * len(compared)


def test_more_tokens_than_dimensions():
    """Once the picked tokens span the space, the most relevant of the others follow."""
    compared = []
    for n, count, dtype, generator in cases(100, seed=2, smallest=8):
        dimensions = 2 + n % 3
        embeddings = torch.randn(n, dimensions, generator=generator).to(dtype)
        words = torch.randn(2, dimensions, generator=generator).to(dtype)
        r = normalised(mean_cosine(embeddings.tolist(), words.tolist()))
        picks, _, gaps = reference(embeddings.tolist(), r, count)
        got = order(CDPruner(keep=count), {Embeddings(): embeddings}, count, words)
        compared.append(agreement(got, picks, gaps))
        if gaps[:dimensions] and min(gaps[:dimensions]) > 1e-4:
            rest = [r[i] for i in got[dimensions:]]
            assert all(a > b - 1e-5 for a, b in itertools.pairwise(rest))
    assert sum(compared) > 0.8 * len(compared)


def test_exact_ties_go_to_the_lower_index():
    """Orthogonal tokens without a question are equal; copies of them come last."""
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        distinct = int(torch.randint(2, 12, (), generator=generator))
        which = torch.cat([torch.arange(distinct), torch.randint(0, distinct, (8,), generator=generator)])
        which = which[torch.randperm(len(which), generator=generator)]
        embeddings, count = torch.eye(16)[which], len(which) - 1
        first = sorted({kind: i for i, kind in reversed(list(enumerate(which.tolist())))}.values())
        expected = first + [i for i in range(len(which)) if i not in first]
        assert reference(embeddings.tolist(), [1.0] * len(which), count)[0] == expected[:count]
        assert order(CDPruner(keep=count), {Embeddings(): embeddings}, count, torch.zeros(0, 16)) == expected[:count]


def test_factors_multiply_to_the_determinant_and_never_rise():
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        embeddings, words = torch.randn(20, 12, generator=generator), torch.randn(3, 12, generator=generator)
        r = normalised(mean_cosine(embeddings.tolist(), words.tolist()))
        picks, factors, _ = reference(embeddings.tolist(), r, 8)
        assert order(CDPruner(keep=8), {Embeddings(): embeddings}, 8, words) == picks
        k = kernel(embeddings.tolist(), r)
        assert math.prod(factors) == pytest.approx(determinant([[k[a][b] for b in picks] for a in picks]))
        assert factors == sorted(factors, reverse=True)


def test_constant_relevance_counts_for_nothing():
    embeddings = torch.randn(30, 40)
    alone = order(CDPruner(keep=9), {Embeddings(): embeddings}, 9, torch.zeros(0, 40))
    for constant in (0.01, 1.0, 700.0):
        assert pick(embeddings.tolist(), [constant] * 30, 9) == alone
    assert order(CDPruner(keep=9), {Embeddings(): embeddings}, 9, torch.zeros(2, 40)) == alone
    assert order(CDPruner(keep=9, theta=0.0), {Embeddings(): embeddings}, 9, torch.randn(2, 40)) == alone


def test_relevance_is_brought_to_the_same_range_in_each_crop():
    relevance = torch.tensor([[0.2, 0.3, 0.25], [-5.0, 5.0, 0.0], [0.7, 0.7, 0.7]])
    expected = torch.tensor([[0.0, 1.0, 0.5], [0.0, 1.0, 0.5], [1.0, 1.0, 1.0]])
    torch.testing.assert_close(weights(relevance), expected, atol=2e-5, rtol=0)
    assert (weights(relevance) > 0).all()
    for theta in (0.0, 0.5, 0.99, 0.9999):
        assert weights(relevance, theta).isfinite().all()


def test_each_prompt_has_its_own_question():
    embeddings, words = torch.randn(2, 30, 12), torch.randn(2, 4, 12)
    together = CDPruner(keep=7).pick(crop_batch({Embeddings(): embeddings}, words), 7).tolist()
    assert together == [
        order(CDPruner(keep=7), {Embeddings(): e}, 7, w) for e, w in zip(embeddings, words, strict=True)
    ]
    swapped = CDPruner(keep=7).pick(crop_batch({Embeddings(): embeddings}, words.flip(0)), 7).tolist()
    assert swapped != together


@pytest.mark.parametrize("theta", [-0.1, 1.0, 2.0, math.nan])
def test_impossible_parameters_are_refused(theta):
    with pytest.raises(FoveateError, match="theta"):
        CDPruner(keep=8, theta=theta)
