"""HiPrune against a plain version with lists."""

import math

import pytest
import torch
from greedy_cases import SALIENCY64, cases

from foveate import Budget
from foveate.core.crops import CropBatch
from foveate.core.errors import FoveateError, InputError
from foveate.core.probes import Attention
from foveate.methods import HiPrune
from tiny import visual_tokens


def pick(reducer, middle, last, grid, count):
    """Run the method on attention ``[B, N]`` of both layers."""
    batch, size = middle.shape
    planes = dict(zip(reducer.needs, (middle, last), strict=True))
    return reducer.pick(CropBatch(grid, tuple(range(batch)), size, middle.device, planes), count)


def kept_of(reducer, middle, last, grid, count):
    middle, last = torch.as_tensor(middle)[None], torch.as_tensor(last)[None]
    return sorted(pick(reducer, middle, last, grid, count)[0].tolist())


def reference(middle, last, grid, count, alpha=0.1, wrap=True):
    height, width = grid
    by_middle = sorted(range(len(middle)), key=lambda i: -middle[i])
    by_last = sorted(range(len(last)), key=lambda i: -last[i])
    cross = set()
    for anchor in by_middle[: round(count * alpha / 5)]:
        cross.add(anchor)
        for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            if wrap:
                cross.add(min(max(anchor + down * width + right, 0), height * width - 1))
            elif 0 <= anchor // width + down < height and 0 <= anchor % width + right < width:
                cross.add(anchor + down * width + right)
    kept = [i for i in by_middle if i in cross][:count]
    kept += [i for i in by_last if i not in cross][: count - len(kept)]
    return sorted(kept)


@pytest.mark.parametrize("wrap", [True, False])
def test_published_picks(wrap):
    middle, kept = SALIENCY64[::-1], [1, 2, 5, 8, 9, 10, 13, 17, 21, 24, 32, 35, 43, 46, 54, 62]
    assert max(range(64), key=lambda i: middle[i]) == 9
    assert reference(middle, SALIENCY64, (8, 8), 16, 0.4, wrap) == kept
    assert kept_of(HiPrune(keep=16, alpha=0.4, wrap=wrap), middle, SALIENCY64, (8, 8), 16) == kept


@pytest.mark.parametrize(("count", "anchors"), [(192, 4), (128, 3), (64, 1), (32, 1), (16, 0)])
def test_number_of_anchors(count, anchors):
    """Anchors far from each other and from the border bring four neighbours each; the last layer names others."""
    middle, last = torch.zeros(24, 24), torch.zeros(24, 24)
    places = [(4, 4), (4, 12), (4, 20), (12, 4), (12, 12)]
    for i, (row, column) in enumerate(places):
        middle[row, column] = 10 - i
        last[row - 1 : row + 2, column - 1 : column + 2] = -1
    got = kept_of(HiPrune(keep=count), middle.flatten(), last.flatten(), (24, 24), count)
    assert len(got) == count
    crosses = {24 * (r + y) + c + x for r, c in places for y, x in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))}
    assert len(crosses & set(got)) == 5 * anchors


def test_without_anchors_the_last_layer_decides():
    middle, last = torch.rand(64), torch.rand(64)
    for reducer, count in ((HiPrune(keep=16), 16), (HiPrune(keep=60, alpha=0.0), 60)):
        assert kept_of(reducer, middle, last, (8, 8), count) == sorted(last.topk(count).indices.tolist())


def test_neighbours_at_the_border():
    last = torch.arange(20.0)  # the end of the grid, if nothing else
    corner, edge = torch.zeros(20), torch.zeros(20)
    corner[0], edge[9] = 1, 1  # grid of 4 x 5: the first token, the last one of the second row
    for middle, wrap, kept in (
        (corner, True, [0, 1, 5, 18, 19]),
        (corner, False, [0, 1, 5, 18, 19]),
        (edge, True, [4, 8, 9, 10, 14]),
        (edge, False, [4, 8, 9, 14, 19]),
    ):
        assert kept_of(HiPrune(keep=5, alpha=1.0, wrap=wrap), middle, last, (4, 5), 5) == kept
    top = torch.zeros(20)
    top[3] = 1  # published: its neighbour above, out of the grid, becomes the first token
    assert kept_of(HiPrune(keep=5, alpha=1.0), top, last, (4, 5), 5) == [0, 2, 3, 4, 8]
    assert kept_of(HiPrune(keep=5, alpha=1.0, wrap=False), top, last, (4, 5), 5) == [2, 3, 4, 8, 19]


def test_a_cross_above_the_budget_is_cut_by_the_middle_layer():
    middle = torch.tensor([0.1, 0.5, 0.2, 0.4, 0.9, 0.3, 0.0, 0.6, 0.7])
    # Three tokens, one anchor in the middle of 3 x 3 with neighbours 1, 3, 5, 7.
    assert kept_of(HiPrune(keep=3, alpha=1.0), middle, -middle, (3, 3), 3) == [1, 4, 7]


@pytest.mark.parametrize("wrap", [True, False])
def test_random_inputs_give_the_reference_selection(wrap):
    for n, count, dtype, generator in cases(120, seed=2):
        heights = [h for h in range(1, n + 1) if n % h == 0]
        height = heights[int(torch.randint(len(heights), (), generator=generator))]
        middle, last = torch.rand(2, n, generator=generator).to(dtype)
        if n % 3 == 0:
            middle, last = (4 * middle).round(), (4 * last).round()
        alpha = (0.1, 0.4, 1.0)[n % 3]
        grid = (height, n // height)
        kept = reference(middle.tolist(), last.tolist(), grid, count, alpha, wrap)
        assert kept_of(HiPrune(keep=count, alpha=alpha, wrap=wrap), middle, last, grid, count) == kept


def test_batch_equals_loop_over_crops():
    middle, last = torch.rand(5, 48), torch.rand(5, 48)
    reducer = HiPrune(keep=17, alpha=0.6)
    together = pick(reducer, middle, last, (6, 8), 17).sort(dim=1).values.tolist()
    assert together == [kept_of(reducer, m, x, (6, 8), 17) for m, x in zip(middle, last, strict=True)]


def test_what_is_no_number_comes_last():
    middle, last = torch.rand(36), torch.rand(36)
    last[::2] = math.nan
    middle[7] = math.nan
    kept = kept_of(HiPrune(keep=10), middle, last, (6, 6), 10)
    assert all(i % 2 for i in kept)
    assert len(set(kept_of(HiPrune(keep=20, alpha=1.0), middle, last, (6, 6), 20))) == 20


def test_layers():
    middle, last = HiPrune(keep=8).needs
    assert (middle.numbers(24, 22), last.numbers(24, 22)) == ([8], [22])
    middle, _ = HiPrune(keep=8, object_layer=15 / 32).needs
    assert middle.numbers(32, 31) == middle.numbers(32, 31, [7, 15, 23, 31]) == [15]
    middle, last = HiPrune(keep=8).needs
    assert (middle.numbers(32, 31, [7, 15, 23, 31]), last.numbers(32, 31, [7, 15, 23, 31])) == ([7], [31])
    assert HiPrune(keep=8, object_layer=11 / 32).needs[0].numbers(32, 31, [7, 15, 23, 31]) == [7]  # as near as 15
    assert HiPrune(keep=8).needs[0] == Attention(of="received", layers=(1 / 3,))


def test_the_grid_is_needed():
    reducer = HiPrune(keep=Budget(8, per="joint"))
    with pytest.raises(InputError, match="hiprune needs the whole token grid"):
        reducer.select(visual_tokens(reducer, [(0, [(6, 8), (8, 8)])]))


@pytest.mark.parametrize(
    ("config", "message"),
    [({"alpha": 1.1}, "alpha"), ({"alpha": -0.1}, "alpha"), ({"object_layer": 1.0}, "object_layer")],
)
def test_impossible_parameters_are_refused(config, message):
    with pytest.raises(FoveateError, match=message):
        HiPrune(keep=8, **config)
