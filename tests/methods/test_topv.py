"""TopV: the numbers of the specification, and what its transport must not lose."""

from dataclasses import replace

import pytest
import torch
from layer_cases import layer_tokens

from foveate.core.errors import BudgetError, FoveateError
from foveate.core.in_llm import tokens_per_layer
from foveate.core.probes import LayerStates
from foveate.core.spans import Crop, Span
from foveate.methods import TopV
from foveate.methods.topv import sent, visual_cost, with_recovery

SOURCE = torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0]])
TARGET = torch.tensor([[1.0, 0], [1, 1], [1, 1], [0, 1]])
PLACES = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
COST = [[0, 1.122459, 1.122459, 2], [1.622459, 0.5, 1.5, 0.622459], [1.122459, 1, 0, 1.122459],
        [1.5, 1.622459, 1.622459, 0.5]]  # fmt: skip


def close(a, b, tolerance=2e-6):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), atol=tolerance, rtol=0)


def cost():
    distance = torch.cdist(SOURCE, TARGET).square()
    close(distance, [[0, 1, 1, 2], [2, 1, 1, 0], [1, 0, 0, 1], [1, 2, 2, 1]])
    return visual_cost(distance, PLACES, sigma=1.0)


def sent_with_sources_last(cost, iterations, share):
    kernel, v = (-cost.double() / 0.1).exp(), torch.ones(len(cost), dtype=torch.float64)
    for _ in range(iterations):
        v = 1 / len(cost) / (kernel.T @ (share / (kernel @ v)))
        u = share / (kernel @ v)
    return u * (kernel @ v)


def test_cost():
    distance = torch.tensor([[0.0, 1, 1, 2], [2, 1, 1, 0], [1, 0, 0, 1], [1, 2, 2, 1]])
    near, across = 1 - torch.tensor(-0.5).exp(), 1 - torch.tensor(-1.0).exp()
    close(torch.stack([near, across]), [0.393469, 0.632121])
    found = cost()
    close(found, COST)  # the centre is as far from all four
    close(visual_cost(torch.full((4, 4), 3.0), PLACES), visual_cost(torch.zeros(4, 4), PLACES))
    close(visual_cost(distance, PLACES + 7, sigma=1.0), found)  # nothing depends on where the image begins


@pytest.mark.parametrize(
    ("iterations", "expected"),
    [(1, [0.249990, 0.296261, 0.250005, 0.203743]), (3, [0.249988, 0.276569, 0.250011, 0.223433]),
     (100, [0.249950, 0.251042, 0.250064, 0.248944])],
)  # fmt: skip
def test_importance(iterations, expected):
    found = sent(cost(), iterations)
    close(found, expected, 3e-6)
    assert (int(found.argmax()), int(found.argmin())) == (1, 3)
    close(sent_with_sources_last(cost(), iterations, torch.full((4,), 0.25).double()), [0.25] * 4)
    norms = SOURCE.norm(dim=1).double()
    norms /= norms.sum()
    close(sent_with_sources_last(cost(), iterations, norms), [0.292893, 0.292893, 0.414214, 0])


def test_recovery():
    importance = torch.tensor([0.30, 0.05, 0.12, 0.20, 0.01, 0.09, 0.15, 0.02, 0.06])
    assert with_recovery(importance, 5, 4).tolist() == [0, 1, 3, 6, 7]
    assert with_recovery(importance, 5, 0).tolist() == [0, 2, 3, 5, 6]
    assert with_recovery(importance, 2, 4).tolist() == [0, 4]  # nothing by importance


@pytest.mark.parametrize(("total", "recovery", "best"), [(288, 4, 192), (252, 4, 144), (256, 6, 192), (145, 6, 58)])
def test_totals_with_recovery(total, recovery, best):
    importance = torch.rand(576, generator=torch.Generator().manual_seed(0))
    kept = with_recovery(importance, total, recovery)
    assert len(kept) == total
    assert len(kept.unique()) == total
    order = importance.argsort(descending=True)
    dropped = order[best:].sort().values
    assert kept.tolist() == sorted([*order[:best].tolist(), *dropped[::recovery].tolist()])


@pytest.mark.parametrize("recovery", [2, 3, 4, 6, 9])
@pytest.mark.parametrize("size", [1, 7, 64, 101])
def test_every_total_is_met(size, recovery):
    importance = torch.rand(size, generator=torch.Generator().manual_seed(size))
    for total in range(1, size):
        assert len(with_recovery(importance, total, recovery).unique()) == total


def grid_tokens(count, grids=((4, 5),), separators=False, seed=0):
    crops, start, planes = [], 0, []
    generator = torch.Generator().manual_seed(seed)
    for h, w in grids:
        crops.append(Crop(torch.arange(start, start + h * w), (h, w)))
        start += h * w + separators
        planes.append([torch.randn(h * w, 8, generator=generator) for _ in range(2)])
    values = {LayerStates("input"): [a for a, _ in planes], LayerStates("mlp"): [b for _, b in planes]}
    span = Span("image", 0, 0, torch.arange(start), (len(grids), *grids[0]), tuple(crops))
    return replace(layer_tokens([start], [count]), spans=(span,), planes=values)


def test_order_of_tokens_does_not_matter():
    tokens = grid_tokens(9)
    (crop,) = tokens.spans[0].crops
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))
    shuffled = Crop(torch.arange(20), None, cells=crop.places()[order])
    moved = replace(tokens, spans=(replace(tokens.spans[0], crops=(shuffled,)),),
                    planes={p: [x[order] for x in plane] for p, plane in tokens.planes.items()})  # fmt: skip
    for score in ("transport", "cost"):
        reducer = TopV(keep=9, recovery=0, score=score)
        kept = reducer.select(tokens)[0].kept
        assert sorted(order[reducer.select(moved)[0].kept].tolist()) == kept.tolist()


def test_scores_are_not_the_marginals():
    tokens = grid_tokens(9)
    source, target = (tokens.planes[p][0] for p in TopV(keep=9).needs)
    unit = [torch.nn.functional.normalize(x, dim=1) for x in (source, target)]
    importance = sent(visual_cost(torch.cdist(*unit), tokens.spans[0].crops[0].places()))
    assert importance.std() > 1e-3 * importance.mean()
    expected = importance.argsort(descending=True)[:9].sort().values
    assert TopV(keep=9, recovery=0).select(tokens)[0].kept.tolist() == expected.tolist()


def test_tiles_share_the_budget_and_separators_stay():
    tokens = grid_tokens(30, ((4, 5), (6, 5)), separators=True)
    (chosen,) = TopV(keep=30).select(tokens)
    kept = chosen.kept
    assert len(kept) == 30
    assert {20, 51} <= set(kept.tolist())
    assert int((kept < 20).sum()) == 11  # of 28: 11.2
    alone = grid_tokens(11)
    assert TopV(keep=11).select(alone)[0].kept.tolist() == kept[kept < 20].tolist()


def test_a_thinned_out_grid_keeps_its_places():
    tokens = grid_tokens(6)
    (crop,) = tokens.spans[0].crops
    rank = torch.tensor([0, 3, 4, 7, 11, 12, 13, 18, 19])
    left = crop.thinned(rank, torch.arange(9))
    assert left.places().tolist() == [[i // 5, i % 5] for i in rank.tolist()]
    assert left.thinned(torch.tensor([1, 8]), torch.arange(2)).places().tolist() == [[0, 3], [3, 4]]
    assert Crop(torch.arange(9), None).thinned(torch.tensor([1]), torch.arange(1)).places() is None


def test_one_cut_at_a_mean():
    assert tokens_per_layer(TopV(keep=268), 32, 576) == (576,) * 3 + (268,) * 29
    assert TopV(equivalent=192, recovery=0).counts(32, [("image", 576)]) == (152,)
    with pytest.raises(BudgetError, match="earlier layer"):
        TopV(equivalent=50, recovery=0).counts(32, [("image", 576)])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"keep": 9, "layer": 0}, "at least 1"), ({"keep": 9, "recovery": 1}, "2 and more"), ({}, "needs a budget"),
     ({"keep": 9, "target": "input"}, "'mlp' or 'output'"), ({"keep": 9, "score": "x"}, "'transport' or 'cost'")],
)  # fmt: skip
def test_bad_parameters(options, message):
    with pytest.raises(FoveateError, match=message):
        TopV(**options)


def test_budgets_below_what_recovery_keeps():
    with pytest.raises(BudgetError, match="no less than 144 of 576"):
        TopV(keep=64).counts(32, [("image", 576)])
    assert TopV(keep=64, recovery=0).counts(32, [("image", 576)]) == (64,)
