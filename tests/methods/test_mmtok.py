"""MMTok against the plain loop in float64, and the picks and gains that its description promises."""

import itertools
import math

import pytest
import torch
from greedy_cases import S64, agreement, cases, choose, cosines, crop_batch, order, text, wave

from foveate.core.errors import FoveateError
from foveate.core.probes import Embeddings, Features
from foveate.methods import MMTok
from foveate.methods.mmtok import cover

F64, WORDS = wave(64, 12, 0.9, 1.1), text(3)


def softmax_rows(matrix, temperature, total):
    rows = []
    for row in matrix:
        powers = [math.exp((x - max(row)) / temperature) for x in row]
        rows.append([x / math.fsum(powers) * total / len(matrix) for x in powers])
    return rows


def reference(embeddings, features, words, count, tau=0.02, tau_vision=0.2, alpha=0.5, excluded=()):
    """Return the picks, the gain of each, and by how much each was ahead."""
    rows = softmax_rows(cosines(words, embeddings), tau, 1.0) if words else []
    rows += softmax_rows(cosines(features, features), tau_vision, alpha)
    covered = [0.0] * len(rows)
    picks, values, gaps = [], [], []
    for _ in range(count):
        scores = {
            j: math.fsum(max(0.0, row[j] - c) for row, c in zip(rows, covered, strict=True))
            for j in range(len(embeddings)) if j not in picks and j not in excluded
        }  # fmt: skip
        pick, gap = choose(scores)
        picks.append(pick)
        values.append(scores[pick])
        gaps.append(gap)
        covered = [max(c, row[pick]) for row, c in zip(rows, covered, strict=True)]
    return picks, values, gaps


def planes(embeddings, features):
    return {Embeddings(): torch.as_tensor(embeddings), Features(): torch.as_tensor(features)}


@pytest.mark.parametrize("tau", [0.02, 0.01])
def test_published_picks(tau):
    picks, gains, gaps = reference(S64, F64, WORDS, 6, tau)
    assert picks == [24, 11, 49, 40, 29, 30]
    if tau == 0.02:
        assert gains == pytest.approx([0.330357, 0.273074, 0.242479, 0.008497, 0.007843, 0.007832], abs=1e-6)
        assert min(gaps) == pytest.approx(1.4e-3, rel=0.05)
    assert order(MMTok(keep=6, text_temperature=tau), planes(S64, F64), 6, WORDS) == picks


def test_published_picks_without_the_first_columns():
    picks = [24, 49, 58, 40, 29, 32]
    assert reference(S64, F64, WORDS, 6, excluded=range(16))[0] == picks
    matrix = MMTok(keep=6)._coverage(*(torch.tensor([x]) for x in (S64, F64, WORDS)))
    taken = (torch.arange(64) < 16)[None]
    assert cover(matrix, 6, taken, 5e-5)[0].tolist() == picks


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"text_temperature": 0.2, "vision_temperature": 0.5, "vision_weight": 2.0},
        {"text_temperature": 0.1, "vision_temperature": 0.3, "vision_weight": 0.1},
    ],
)
def test_random_inputs_give_the_picks_of_the_loop(config):
    compared = []
    for n, count, dtype, generator in cases(100, seed=1, largest=30):
        embeddings = torch.randn(n, 6, generator=generator).to(dtype)
        features = torch.randn(n, 9, generator=generator).to(dtype)
        words = torch.randn(n % 4, 6, generator=generator).to(dtype)  # none in every fourth case
        picks, _, gaps = reference(
            embeddings.tolist(), features.tolist(), words.tolist(), count, config.get("text_temperature", 0.02),
            config.get("vision_temperature", 0.2), config.get("vision_weight", 0.5),
        )  # fmt: skip
        got = order(MMTok(keep=count, **config), planes(embeddings, features), count, words)
        compared.append(agreement(got, picks, gaps))
    assert sum(compared) > 0.9 * len(compared)


def test_exact_ties_go_to_the_lower_index():
    """Orthogonal tokens cover alike; tokens that a word points at come first."""
    features = torch.eye(12)
    for case in range(100):
        generator = torch.Generator().manual_seed(case)
        words = torch.eye(12)[torch.randint(0, 12, (case % 3,), generator=generator)]
        count = 1 + case % 11
        expected = reference(features.tolist(), features.tolist(), words.tolist(), count)[0]
        assert order(MMTok(keep=count), planes(features, features), count, words) == expected


def test_shares_sum_up():
    matrix = MMTok(keep=6)._coverage(*(torch.tensor([x]) for x in (S64, F64, WORDS)))
    assert matrix.shape == (1, 64, 67)
    torch.testing.assert_close(matrix.sum(dim=1)[0, :3], torch.full((3,), 1 / 3))
    torch.testing.assert_close(matrix.sum(dim=1)[0, 3:], torch.full((64,), 0.5 / 64))


def test_gains_never_rise():
    gains = reference(S64, F64, WORDS, 20)[1]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(gains))


def test_the_best_match_of_each_word_comes_first_at_a_low_temperature():
    best = {max(range(64), key=row.__getitem__) for row in cosines(WORDS, S64)}
    picks = order(MMTok(keep=6, text_temperature=0.001), planes(S64, F64), 6, WORDS)
    assert len(best) == 3
    assert set(picks[:3]) == best


def test_the_question_matters():
    first, other = (order(MMTok(keep=6), planes(S64, F64), 6, words) for words in (WORDS, WORDS[::-1][:1]))
    assert first != other
    # A batch of two prompts with different words.
    batch = crop_batch({p: torch.stack([x, x]) for p, x in planes(S64, F64).items()}, [WORDS, text(6)[3:]])
    together = MMTok(keep=6).pick(batch, 6).tolist()
    assert together == [first, order(MMTok(keep=6), planes(S64, F64), 6, text(6)[3:])]
    assert together[0] != together[1]


@pytest.mark.parametrize("name", ["text_temperature", "vision_temperature", "vision_weight"])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_impossible_parameters_are_refused(name, value):
    with pytest.raises(FoveateError, match=name):
        MMTok(keep=8, **{name: value})


def test_a_temperature_that_float32_cannot_resolve_is_refused():
    with pytest.raises(FoveateError, match=r"text_temperature .* at least 0\.001, not 1e-06"):
        MMTok(keep=8, text_temperature=1e-6)
