"""Compaction against lists: every row by itself, one column at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.core.errors import InputError
from foveate.core.selection import Selection, SpanSelection
from foveate.core.spans import Crop, Span
from foveate.engines.transformers.compaction import Compaction, full_positions, plan
from foveate.engines.transformers.keywords import compact_planes

PAD_ID = 9


@st.composite
def batches(draw):
    """Draw rows of text and spans, a padding side, and what each span keeps."""
    rows, spans, chosen = draw(st.integers(1, 4)), [], []
    contents = []
    for _ in range(rows):
        length, columns = 0, []
        for ordinal in range(draw(st.integers(0, 2))):
            length += draw(st.integers(0, 4))
            n = draw(st.integers(1, 6))
            columns.append((ordinal, list(range(length, length + n))))
            length += n
        length += draw(st.integers(0 if length else 1, 4))
        contents.append((length, columns))
    width = max(5, *(length + draw(st.integers(0, 2)) for length, _ in contents))
    side = draw(st.sampled_from(["left", "right"]))
    mask = torch.zeros(rows, width, dtype=torch.long)
    for row, (length, columns) in enumerate(contents):
        shift = width - length if side == "left" else 0
        mask[row, shift : shift + length] = 1
        for ordinal, places in columns:
            n = len(places)
            index = torch.tensor(places) + shift
            spans.append(Span("image", row, ordinal, index, (1, 1, n), (Crop(torch.arange(n), (1, n)),)))
            kept = sorted(draw(st.sets(st.integers(0, n - 1), min_size=0)))
            chosen.append(SpanSelection(n, torch.tensor(kept, dtype=torch.long), sample=row))
    ids = 10 + torch.arange(rows * width).reshape(rows, width)
    if bool(mask.all()) and draw(st.booleans()):
        mask = None
    return ids, mask, spans, Selection(tuple(chosen)), side


def kept_columns(ids, mask, spans, selection):
    """Return the columns that stay, as one list per row."""
    rows = [[] for _ in ids]
    for row in range(len(ids)):
        dropped = set()
        for span, chosen in zip(spans, selection, strict=True):
            if span.sample == row:
                dropped |= set(span.columns.tolist()) - {int(span.columns[i]) for i in chosen.kept}
        rows[row] = [c for c in range(ids.shape[1]) if (mask is None or mask[row, c]) and c not in dropped]
    return rows


def padded(rows, fill, side, width):
    fillers = [[fill] * (width - len(row)) for row in rows]
    return [f + row if side == "left" else row + f for f, row in zip(fillers, rows, strict=True)]


def real_side(mask, side):
    """Return the side on which rows are aligned: padding on the right of any row makes it the right."""
    return "left" if mask is None or bool(mask[:, -1].all()) else side


@settings(max_examples=200, deadline=None)
@given(batches())
def test_every_plane_is_compacted_alike(batch):
    ids, mask, spans, selection, side = batch
    rows = kept_columns(ids, mask, spans, selection)
    compaction = plan(ids, mask, spans, selection)
    side, width = real_side(mask, side), max(map(len, rows))
    assert compaction.width == width
    assert compaction.columns.tolist() == padded(rows, -1, side, width)
    assert compaction.padded == any(len(row) < width for row in rows)

    b, length = ids.shape
    planes = {
        "input_ids": ids, "labels": ids + 1000, "token_type_ids": ids + 2000,
        "inputs_embeds": torch.randn(b, length, 3), "position_ids": torch.stack([ids, ids + 1, ids + 2]),
        "pixel_values": torch.randn(b, 3, 4, 4), "use_cache": True,
    }  # fmt: skip
    if mask is not None:
        planes["attention_mask"] = mask
    out = compact_planes(planes, compaction, PAD_ID)

    def expected(plane, fill):
        return padded([[plane[i, c].item() for c in row] for i, row in enumerate(rows)], fill, side, width)

    assert out["input_ids"].tolist() == expected(ids, PAD_ID)
    assert out["labels"].tolist() == expected(ids + 1000, -100)
    assert out["token_type_ids"].tolist() == expected(ids + 2000, 0)
    for k in range(3):
        assert out["position_ids"][k].tolist() == expected(ids + k, 0)
        assert out["inputs_embeds"][..., k].tolist() == expected(planes["inputs_embeds"][..., k], 0.0)
    if mask is not None or compaction.padded:
        assert out["attention_mask"].tolist() == padded([[1] * len(row) for row in rows], 0, side, width)
    else:
        assert "attention_mask" not in out
    assert out["pixel_values"] is planes["pixel_values"]
    assert out["use_cache"] is True

    # Text is never dropped nor reordered, and visual tokens keep their order.
    visual = {(s.sample, int(c)) for s in spans for c in s.columns}
    for i in range(b):
        kept = [c for c in compaction.columns[i].tolist() if c >= 0]
        assert kept == sorted(kept)
        text = [c for c in range(length) if (mask is None or mask[i, c]) and (i, c) not in visual]
        assert [c for c in kept if (i, c) not in visual] == text


@settings(max_examples=100, deadline=None)
@given(batches(), batches(), st.integers(0, 3))
def test_then_and_followed_by(first, second, extra):
    rows = min(len(first[0]), len(second[0]))
    a, b = (
        Compaction(c.columns[:rows], c.length, bool((c.columns[:rows] < 0).any()))
        for c in (plan(*x[:4]) for x in (first, second))
    )
    x, more, y = (torch.randint(100, (rows, n)) for n in (a.length, extra, b.length))
    longer = a.then(extra)
    assert (longer.length, longer.width) == (a.length + extra, a.width + extra)
    assert torch.equal(longer.apply(torch.cat([x, more], 1), -7), torch.cat([a.apply(x, -7), more], 1))
    both = longer.followed_by(b)
    assert both.length == a.length + extra + b.length
    assert both.padded == (a.padded or b.padded)
    assert torch.equal(both.apply(torch.cat([x, more, y], 1), -7), torch.cat([a.apply(x, -7), more, b.apply(y, -7)], 1))
    assert torch.equal(a.then(1).then(2).columns, a.then(3).columns)
    twice = a.expanded(2 * rows)
    assert torch.equal(twice.apply(x.repeat_interleave(2, 0)), a.apply(x).repeat_interleave(2, 0))
    assert a.expanded(rows) is a


def test_a_batch_that_is_no_multiple_is_refused():
    with pytest.raises(InputError, match="2 prompts cannot be continued with a batch of 3"):
        Compaction(torch.zeros(2, 4, dtype=torch.long), 4, False).expanded(3)


def test_hidden_placeholders_are_refused():
    span = Span("image", 0, 0, torch.tensor([1, 2]), (1, 1, 2), (Crop(torch.arange(2), (1, 2)),))
    selection = Selection((SpanSelection(2, torch.tensor([0])),))
    with pytest.raises(InputError, match="hides some visual placeholders"):
        plan(torch.zeros(1, 4), torch.tensor([[1, 1, 0, 1]]), [span], selection)


def test_four_dimensional_masks_are_refused():
    compaction = Compaction(torch.tensor([[0, 2]]), 3, False)
    with pytest.raises(InputError, match="2-D mask"):
        compact_planes({"attention_mask": torch.ones(1, 1, 3, 3)}, compaction, PAD_ID)


def test_positions_shared_by_all_rows():
    compaction = Compaction(torch.tensor([[0, 2], [-1, 1]]), 3, True)
    out = compact_planes({"position_ids": torch.tensor([[5, 6, 7]])}, compaction, PAD_ID)
    assert out["position_ids"].tolist() == [[5, 7], [0, 6]]
    assert out["attention_mask"].tolist() == [[1, 1], [0, 1]]


def test_full_positions():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    assert full_positions(mask, 3, 4, mask.device).tolist() == [[0, 0, 0, 1], [0, 1, 2, 0], [0, 1, 2, 3]]
    assert full_positions(None, 2, 3, mask.device).tolist() == [[0, 1, 2]] * 2
