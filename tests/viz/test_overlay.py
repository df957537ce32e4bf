from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveate import FoveateError, Selection
from foveate.core.selection import Merge, SpanSelection
from foveate.core.spans import Crop, Span
from foveate.viz import draw, save
from foveate.viz.fate import Fate, fate
from foveate.viz.overlay import highlight


def _span(kind: str, crops: tuple[Crop, ...], length: int) -> Span:
    return Span(kind, 0, 0, torch.arange(length), (len(crops), 4, 4), crops)


def _image_span() -> Span:
    return _span("image", (Crop(torch.arange(16), (4, 4)),), 16)


def _tiled_span() -> Span:
    boxes = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
    tiles = [Crop(torch.arange(16 * (i + 1), 16 * (i + 2)), (4, 4), box) for i, box in enumerate(boxes)]
    return _span("image", (Crop(torch.arange(16), (4, 4)), *tiles), 48)


def _fate(length: int, kept: list[int]) -> Fate:
    return fate(SpanSelection(length, torch.tensor(kept)))


def test_highlight_dims_what_is_dropped() -> None:
    picture = np.full((40, 40, 3), (0.9, 0.5, 0.2))
    out = highlight(picture, _image_span().crops, _fate(16, [0, 5]))
    np.testing.assert_array_equal(out[:10, :10], picture[:10, :10])
    np.testing.assert_array_equal(out[10:20, 10:20], picture[10:20, 10:20])
    dropped = out[25, 25]
    assert dropped.max() < 0.45
    assert np.ptp(dropped) < np.ptp(picture[0, 0])


def test_highlight_places_tiles_by_their_boxes() -> None:
    picture = np.ones((40, 80, 3))
    span = _tiled_span()
    out = highlight(picture, span.crops[1:], _fate(48, [16 + 15, 32]))
    assert out[35, 35].min() == 1
    assert out[5, 45].min() == 1
    assert out[5, 5].max() < 1


def test_panels_of_an_image_its_tiles_and_frames() -> None:
    picture = Image.new("RGB", (30, 20), "orange")
    heat = [torch.rand(16) for _ in range(3)]

    def titles(span: Span, pictures: list[Image.Image], values: list[torch.Tensor] | None) -> list[str]:
        chosen = Selection((SpanSelection(len(span), torch.tensor([0, 3])),))
        return [axes.get_title("left") for axes in draw([pictures], [span], chosen, values).axes]

    attention = "attention that the encoder pays to each token"
    assert titles(_image_span(), [picture], None) == ["kept 2 of 16 tokens"]
    assert titles(_image_span(), [picture], heat[:1])[:2] == ["kept 2 of 16 tokens", attention]
    assert titles(_tiled_span(), [picture], None) == ["overview: kept 2 of 16 tokens", "2 tiles: kept 0 of 32 tokens"]
    frames = _span("video", tuple(Crop(torch.arange(17 * i + 1, 17 * i + 17), (4, 4)) for i in range(3)), 51)
    assert titles(frames, [picture] * 3, None)[0] == "frame 1: kept 1 of 16 tokens"
    assert len([t for t in titles(frames, [picture] * 3, heat) if t == attention]) == 3
    with pytest.raises(FoveateError, match="one picture or one per crop"):
        titles(frames, [picture] * 2, None)


@pytest.mark.parametrize("size", [(4000, 30), (30, 4000)])
def test_strips_are_stretched_until_their_tokens_show(size: tuple[int, int]) -> None:
    chosen = Selection((SpanSelection(16, torch.tensor([5])),))
    figure = draw([[Image.new("RGB", size)]], [_image_span()], chosen, [torch.rand(16)])
    figure.canvas.draw()
    for axes in figure.axes[:2]:
        box = axes.get_window_extent()
        assert max(box.width / box.height, box.height / box.width) == pytest.approx(5, rel=0.01)
        assert min(box.width, box.height) > 0.85 * figure.dpi
    labels = [label.get_window_extent() for label in figure.axes[1].child_axes[0].get_yticklabels() if label.get_text()]
    inside = [box for box in labels if box.height]
    assert all(a.y1 <= b.y0 for a, b in pairwise(inside))


def test_merged_tokens_are_named_as_such() -> None:
    merge = Merge(torch.zeros(16, dtype=torch.long), torch.arange(16), torch.full((16,), 1 / 16))
    chosen = Selection((SpanSelection(16, torch.tensor([5]), merge),))
    figure = draw([[Image.new("RGB", (8, 8))]], [_image_span()], chosen)
    assert figure.axes[0].get_title("left") == "kept 1, merged 15 of 16 tokens"


def test_crops_without_a_grid_cannot_be_drawn() -> None:
    span = _span("image", (Crop(torch.arange(3), None),), 16)
    with pytest.raises(FoveateError, match="thinned out"):
        draw([[Image.new("RGB", (8, 8))]], [span], Selection((SpanSelection(16, torch.tensor([1])),)))


@pytest.mark.parametrize("size", [(1, 1), (4000, 30), (30, 4000), (640, 480)])
def test_saved_png_of_any_shape(tmp_path: Path, size: tuple[int, int]) -> None:
    chosen = Selection((SpanSelection(48, torch.arange(0, 48, 5)),))
    heat = [torch.zeros(16), torch.rand(16), torch.rand(16)]
    save(
        tmp_path / "x.png", [[Image.new("RGB", size, "teal")]], [_tiled_span()], chosen, heat,
        title="10 of 48", caption="costs $5 or $6? " * 20,
    )  # fmt: skip
    assert Image.open(tmp_path / "x.png").width > 500
