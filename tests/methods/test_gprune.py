"""G-Prune against the plain matrix powers in float64, and the numbers that its description promises."""

import math

import pytest
import torch
from greedy_cases import S16, S64, cases, cosines, order

from foveate.core.errors import FoveateError
from foveate.core.probes import Embeddings
from foveate.methods import GPrune

# The published angle of 310 degrees is 60 from the one of 10: rounding may put that cosine on either side of the
# threshold of 0.5, and the published numbers take it as below.
HAND = [
    [norm * math.cos(math.radians(d)), norm * math.sin(math.radians(d))]
    for d, norm in zip((0, 10, 20, 90, 100, 200, 200.5, 309.99), (1, 2, 1, 1, 3, 1, 1, 2), strict=True)
]


def reference(embeddings, threshold=0.5, tau=0.03, steps=5):
    """Return the scores, the number of neighbours of each token, and the distance of any cosine to the threshold."""
    similarity, n = cosines(embeddings, embeddings), len(embeddings)
    near = min(abs(s - threshold) for row in similarity for s in row)
    share = []
    for row in similarity:
        powers = [math.exp((s - 1) / tau) if s >= threshold else 0.0 for s in row]
        total = math.fsum(powers)
        share.append([x / total if total else 1 / n for x in powers])
    power = [[float(i == j) for j in range(n)] for i in range(n)]
    for _ in range(steps):
        power = [[math.fsum(row[k] * share[k][j] for k in range(n)) for j in range(n)] for row in power]
    norm = [math.sqrt(math.fsum(x * x for x in row)) for row in embeddings]
    degree = [sum(s >= threshold for s in row) for row in similarity]
    scores = [math.fsum(norm[i] * power[i][j] for i in range(n)) / max(degree[j], 1) for j in range(n)]
    return scores, degree, near


def best(scores, count):
    """Return the kept tokens, and by how much the last of them is ahead of the first dropped one."""
    ranking = sorted(range(len(scores)), key=lambda i: -scores[i])
    return sorted(ranking[:count]), scores[ranking[count - 1]] - scores[ranking[count]]


def scores_of(embeddings, **config):
    return GPrune(keep=1, **config)._score(torch.as_tensor(embeddings)[None])[0]


def pick(embeddings, count, **config):
    return order(GPrune(keep=count, **config), {Embeddings(): embeddings}, count)


def test_published_scores():
    scores, degree, near = reference(S16)
    assert degree == [1, 2, 2, 3] + [2] * 12
    assert near == pytest.approx(0.031, abs=5e-4)
    expected = [
        1.614105, 1.025630, 1.056613, 0.355282, 0.981281, 0.991244, 0.959356, 0.830550, 1.232153, 1.096104, 1.101122,
        1.065753, 1.150990, 0.953421, 1.127356, 1.120184,
    ]  # fmt: skip
    assert scores == pytest.approx(expected, abs=1e-6)
    assert scores_of(S16).tolist() == pytest.approx(expected, abs=1e-5)
    assert pick(S16, 8) == best(scores, 8)[0] == [0, 8, 9, 10, 11, 12, 14, 15]


def test_published_set_of_sixteen():
    kept = [17, 20, 24, 25, 28, 30, 32, 33, 34, 35, 36, 38, 40, 41, 43, 44]
    got, gap = best(reference(S64)[0], 16)
    assert got == kept
    assert gap == pytest.approx(1.1e-2, rel=0.05)
    assert pick(S64, 16) == kept


def test_published_scores_by_hand():
    scores, degree, _ = reference(HAND)
    expected = [0.305826, 0.517818, 0.407761, 0.999532, 1.000468, 0.5, 0.5, 0.999978]
    assert degree == [4, 3, 3, 2, 2, 2, 2, 2]
    assert scores == pytest.approx(expected, abs=1e-6)
    assert scores_of(HAND).tolist() == pytest.approx(expected, abs=1e-5)
    assert pick(HAND, 4) == [1, 3, 4, 7]


@pytest.mark.parametrize("config", [{}, {"threshold": 0.2, "temperature": 0.1, "steps": 1}, {"steps": 9}], ids=str)
def test_random_inputs_give_the_scores_of_matrix_powers(config):
    compared = 0
    for n, count, dtype, generator in cases(100, seed=1, smallest=3, largest=22):
        embeddings = torch.randn(n, 4, generator=generator).to(dtype)
        expected, _, near = reference(
            embeddings.tolist(), config.get("threshold", 0.5), config.get("temperature", 0.03), config.get("steps", 5)
        )
        if near < 1e-5:
            continue
        torch.testing.assert_close(scores_of(embeddings, **config), torch.tensor(expected), atol=1e-4, rtol=1e-4)
        kept, gap = best(expected, count)
        if gap > 1e-4:
            assert pick(embeddings, count, **config) == kept
            compared += 1
    assert compared > 85


def test_no_information_is_lost():
    for seed in range(10):
        embeddings = torch.randn(40, 4, generator=torch.Generator().manual_seed(seed))
        degree = torch.tensor(reference(embeddings.tolist())[1])
        total = (scores_of(embeddings) * degree).sum()
        torch.testing.assert_close(total, embeddings.norm(dim=1).sum())


def test_half_precision_counts_the_same_neighbours():
    """A softmax in half precision would lose those with a cosine near the threshold."""
    angles = torch.arange(8) * math.radians(11.0)
    embeddings = torch.stack([angles.cos(), angles.sin()], dim=1).half()
    assert torch.equal(scores_of(embeddings), scores_of(embeddings.float()))
    assert scores_of(embeddings).tolist() == pytest.approx(reference(embeddings.tolist())[0], abs=1e-5)


def test_zero_vectors_lose():
    embeddings = torch.tensor(S16)
    embeddings[[2, 9]] = 0
    scores = scores_of(embeddings)
    assert scores[[2, 9]].tolist() == [0.0, 0.0]
    assert not {2, 9} & set(pick(embeddings, 14))
    assert scores.tolist() == pytest.approx(reference(embeddings.tolist())[0], abs=1e-5)


def test_an_isolated_token_scores_its_own_norm():
    embeddings = torch.eye(6) * torch.tensor([1.0, 5, 2, 4, 3, 6])
    assert scores_of(embeddings).tolist() == pytest.approx([1, 5, 2, 4, 3, 6])
    assert pick(embeddings, 3) == [1, 3, 5]


@pytest.mark.parametrize(
    ("name", "value"),
    [("threshold", 0.0), ("threshold", 1.0), ("threshold", math.nan), ("temperature", 0.0),
     ("temperature", math.inf), ("steps", 0)],
)  # fmt: skip
def test_impossible_parameters_are_refused(name, value):
    with pytest.raises(FoveateError, match=f"{name}|one step"):
        GPrune(keep=8, **{name: value})
