"""Gaze against a dense inverse in float64, and against the numbers of its specification."""

import math

import pytest
import torch
from greedy_cases import agreement, cases, choose, order

import foveate
from foveate import Budget
from foveate.core.crops import CropBatch
from foveate.core.errors import FoveateError
from foveate.core.probes import Attention, Embeddings, Query
from foveate.engines.pipeline import look
from foveate.families import family_of
from foveate.methods import Gaze, GazeQuery
from tiny import FAMILIES, collate, model, sample, samples

LATER = Attention(layers=0.34)
X = [
    [1, 0, 0], [1, 0.1, 0], [1, 0, 0.1], [0.9, 0.05, 0], [0.2, 1, 0], [0, 1, 0.1],
    [1, 0.1, 0.1], [0, 0.1, 1], [0.1, 1, 0.3], [1, 0, 0.05], [1, 0.05, 0], [0.6, 0.8, 0],
]  # fmt: skip
S = [1, 1, 1, 1, 4, 3, 1, 6, 2, 1, 1, 2]
Q = [[0, 1, 0], [0.3, 0.9, 0.1]]


def reference(features, saliency, count, grid, query=None, spread=0.25, ridge=0.1, exponent=0.5):
    """Return the picks, the score of each, and by how much it was ahead; a dense inverse per pick, in float64."""
    x = torch.tensor(features, dtype=torch.float64)
    size = len(x)
    unit = torch.nn.functional.normalize(x, dim=-1)
    mean = unit.mean(dim=0)
    centred = unit - mean
    kernel = centred @ centred.T / max(float(centred.square().sum(dim=-1).mean()), 1e-12)
    if grid is not None:
        places = [(i // grid[1], i % grid[1]) for i in range(size)]
        sigma = spread * max(grid)
        near = [[math.exp(-((a - c) ** 2 + (b - d) ** 2) / (2 * sigma**2)) for c, d in places] for a, b in places]
        kernel = kernel * torch.tensor(near, dtype=torch.float64)
    s = torch.tensor(saliency, dtype=torch.float64)
    weight = (s / (s + s.mean())) ** exponent if s.mean() > 0 else torch.ones(size, dtype=torch.float64)
    if query is not None:
        words = torch.nn.functional.normalize(torch.tensor(query, dtype=torch.float64), dim=-1).mean(dim=0)
        relevance = unit @ words
        low, high = relevance.min(), relevance.max()
        weight = weight * ((relevance - low) / (high - low) + 1e-6)
    first = choose(dict(enumerate((unit @ mean).tolist())))
    picks, scores, gaps = [first[0]], [float(unit[first[0]] @ mean)], [first[1]]
    while len(picks) < count:
        known = picks[1:]
        inner = kernel[known][:, known] + ridge * torch.eye(len(known), dtype=torch.float64)
        found = {}
        for i in range(size):
            if i not in picks:
                row = kernel[i, known]
                explained = row @ torch.linalg.solve(inner, row) if known else 0.0
                found[i] = float(weight[i] * (kernel[i, i] + ridge - explained))
        pick, gap = choose(found)
        picks.append(pick)
        scores.append(found[pick])
        gaps.append(gap)
    return picks, scores, gaps


def crop(features, saliency, grid, query=None):
    planes = {Embeddings(): torch.as_tensor(features)[None], LATER: torch.as_tensor(saliency)[None, :, None]}
    words = None if query is None else torch.as_tensor(query)[None]
    return CropBatch(grid, (0,), len(features), torch.device("cpu"), planes, None, words)


def picked(reducer, features, saliency, count, grid, query=None):
    return reducer.pick(crop(features, saliency, grid, query), count)[0].tolist()


TOY = [
    (Gaze(keep=6, saliency=0.0), None, [6, 7, 5, 8, 4, 11], [2.935712, 2.071087, 1.533330, 0.868211, 0.601216]),
    (Gaze(keep=6), None, [6, 7, 5, 8, 4, 11], [2.542401, 1.604257, 1.084228, 0.708891, 0.425124]),
    (GazeQuery(keep=6), Q, [6, 5, 8, 4, 11, 1], [1.583473, 1.048973, 0.709128, 0.383523, 0.029250]),
]


@pytest.mark.parametrize(("reducer", "query", "picks", "scores"), TOY, ids=["no saliency", "query-free", "query"])
def test_toy(reducer, query, picks, scores):
    expected, found, _ = reference(X, S, 6, (3, 4), query, exponent=reducer.saliency)
    assert expected == picks
    assert found[0] == pytest.approx(0.696718, abs=1e-6)
    assert found[1:] == pytest.approx(scores, abs=1e-6)
    assert picked(reducer, X, [float(s) for s in S], 6, (3, 4), query) == picks


@pytest.mark.parametrize("query", [False, True])
@pytest.mark.parametrize("grid", [True, False])
def test_random_inputs_give_the_reference_picks(query, grid):
    shares = []
    for n, count, dtype, generator in cases(60, seed=3):
        features = torch.randn(n, 6, generator=generator).to(dtype)
        saliency = torch.rand(n, generator=generator).to(dtype)
        words = torch.randn(3, 6, generator=generator).to(dtype) if query else None
        shape = (1, n) if grid else None
        reducer = (GazeQuery if query else Gaze)(keep=count)
        expected, _, gaps = reference(
            features.tolist(), saliency.tolist(), count, shape, words.tolist() if query else None
        )
        got = picked(reducer, features, saliency, count, shape, words)
        shares.append(agreement(got, expected, gaps))
    assert sum(shares) / len(shares) > 0.9


def test_one_token_is_the_representative():
    assert picked(Gaze(keep=1), X, [1.0] * 12, 1, (3, 4)) == [6]


def test_equal_tokens_go_by_weight_then_index():
    equal = [[0.3, 0.4, 0.5]] * 12
    assert picked(Gaze(keep=4), equal, [float(s) for s in S], 4, (3, 4)) == [0, 7, 4, 5]
    assert picked(Gaze(keep=4), equal, [1.0] * 12, 4, (3, 4)) == [0, 1, 2, 3]


def test_a_constant_or_scaled_saliency_changes_nothing():
    plain = picked(Gaze(keep=6, saliency=0.0), X, [1.0] * 12, 6, (3, 4))
    for value in (1e-6, 0.5, 7.0):
        assert picked(Gaze(keep=6), X, [value] * 12, 6, (3, 4)) == plain
    by_s = picked(Gaze(keep=6), X, [float(s) for s in S], 6, (3, 4))
    assert picked(Gaze(keep=6), X, [1e-3 * s for s in S], 6, (3, 4)) == by_s


@pytest.mark.parametrize("value", [math.nan, 0.0, -1.0])
def test_attention_that_is_none_counts_nothing(value):
    saliency = [value, *map(float, S[1:])]
    assert picked(Gaze(keep=6), X, saliency, 6, (3, 4)) == picked(Gaze(keep=6), X, [0.0, *S[1:]], 6, (3, 4))
    assert len(set(picked(Gaze(keep=6), X, [value] * 12, 6, (3, 4)))) == 6


def test_lengths_of_vectors_do_not_matter():
    longer = [[3.0 * i * x for x in row] for i, row in enumerate(X, 1)]
    for reducer, query, picks, _ in TOY:
        assert picked(reducer, longer, [float(s) for s in S], 6, (3, 4), query) == picks


def test_mirrored_pictures_give_mirrored_picks():
    """Tokens that change places with their coordinates."""
    generator = torch.Generator().manual_seed(0)
    x, s = torch.randn(20, 7, generator=generator), torch.rand(20, generator=generator)
    mirror = torch.arange(20).reshape(4, 5).flip(1).flatten()
    plain = picked(Gaze(keep=9), x, s, 9, (4, 5))
    assert [int(mirror[i]) for i in picked(Gaze(keep=9), x[mirror], s[mirror], 9, (4, 5))] == plain


def test_several_layers_count_by_their_mean():
    layers = torch.rand(12, 5, generator=torch.Generator().manual_seed(1))
    planes = {Embeddings(): torch.tensor(X)[None], LATER: layers[None]}
    several = Gaze(keep=6).pick(CropBatch((3, 4), (0,), 12, torch.device("cpu"), planes), 6)[0].tolist()
    assert several == picked(Gaze(keep=6), X, layers.mean(dim=-1), 6, (3, 4))


def test_the_later_two_thirds_of_the_encoder_are_read():
    assert Gaze(keep=1).needs[1].numbers(24, 22) == list(range(8, 23))
    assert Query() in GazeQuery(keep=1).needs
    assert (Gaze(keep=1).query_aware, GazeQuery(keep=1).query_aware) == (False, True)


def test_without_words_the_question_says_nothing():
    reducer, free = GazeQuery(keep=6), Gaze(keep=6)
    words = torch.empty(0, 3)
    assert picked(reducer, X, [float(s) for s in S], 6, (3, 4), words) == picked(
        free, X, [float(s) for s in S], 6, (3, 4)
    )


def test_joint_budgets_and_thinned_grids_do_without_the_grid():
    inputs = collate([sample(4, "image", 5, seed=1)])
    joint = foveate.reduce(model("llava"), inputs, Gaze(keep=Budget(9, per="joint")))
    assert len(joint.selection[0]) == 9
    chain = foveate.Chain(foveate.VisPruner(keep=32), Gaze(keep=9))
    assert len(foveate.reduce(model("llava"), inputs, chain).selection[0]) == 9


@pytest.mark.parametrize("config", [{"spread": 0.0}, {"ridge": -1.0}, {"ridge": math.inf}, {"saliency": -0.1}])
def test_parameters_that_make_no_sense(config):
    with pytest.raises(FoveateError, match=next(iter(config))):
        Gaze(keep=4, **config)


def test_order_helper_agrees():
    planes = {Embeddings(): torch.tensor(X), LATER: torch.tensor(S, dtype=torch.float32)[:, None]}
    assert order(Gaze(keep=6), planes, 6) == reference(X, S, 6, None)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_crop_has_its_own_grid(family):
    """Tiles, frames, merged patches and received attention: what a family shows is what the reference is given."""
    net, inputs, reducer = model(family), collate(samples(family)), Gaze(keep=Budget(3, per="crop"))
    try:
        foveate.attach(net, reducer).detach()
    except FoveateError as error:
        pytest.skip(str(error))
    found = family_of(net)
    tokens = look(net, found, inputs, found.spans(net, inputs), [reducer])
    chosen = reducer.select(tokens)
    planes = zip(tokens.probe(Embeddings()), tokens.probe(LATER), strict=True)
    grids = set()
    for i, span in enumerate(tokens.spans):
        kept = set(chosen[i].kept.tolist())
        for crop in span.crops:
            embeddings, attention = next(planes)
            grids.add(crop.grid)
            picks, _, gaps = reference(embeddings.tolist(), attention.mean(dim=-1).tolist(), 3, crop.grid)
            own = {j for j, token in enumerate(crop.index.tolist()) if token in kept}
            assert own == set(picks) or min(gaps) < 1e-4
    assert grids
