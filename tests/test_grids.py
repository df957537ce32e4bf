"""Geometry of token grids."""

import pytest
import torch

from foveate.core.grids import crop_budgets, smaller_grid
from foveate.core.spans import Crop, Span


@pytest.mark.parametrize(
    ("grid", "count", "smaller"),
    [((4, 6), 3, (1, 3)), ((4, 8), 20, (3, 6)), ((6, 4), 16, (4, 4)), ((6, 6), 20, (4, 5)), ((4, 24), 33, (2, 16))],
)
def test_a_smaller_grid_has_nearly_the_same_shape(grid, count, smaller):
    assert smaller_grid(grid, count) == smaller
    ratio = (smaller[0] / smaller[1]) / (grid[0] / grid[1])
    assert max(ratio, 1 / ratio) <= 2.0
    assert smaller[0] * smaller[1] <= count


@pytest.mark.parametrize(("kind", "count"), [("image", 4), ("video", 2)])
def test_budgets_of_crops_go_by_the_kind_of_the_span(kind, count):
    span = Span(kind, 0, 0, torch.arange(16), (1, 4, 4), (Crop(torch.arange(16), (4, 4)),))
    ((_, grid, found),) = crop_budgets(span, {"image": 4, "video": 2}, "a method")
    assert (grid, found) == ((4, 4), count)
    only = crop_budgets(span, {kind: 3}, "a method")
    assert [n for _, _, n in only] == [3]
