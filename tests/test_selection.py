import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate import Selection
from foveate.core.errors import InputError
from foveate.core.selection import Merge, SpanSelection


@st.composite
def spans(draw, merged=None):
    length = draw(st.integers(1, 20))
    kept = sorted(draw(st.sets(st.integers(0, length - 1), min_size=1)))
    merge = None
    if merged or (merged is None and draw(st.booleans())):
        entries = draw(
            st.lists(
                st.tuples(st.integers(0, len(kept) - 1), st.integers(0, length - 1), st.floats(-2, 2, width=32)),
                max_size=30,
            )
        )
        merge = Merge(
            torch.tensor([e[0] for e in entries], dtype=torch.long),
            torch.tensor([e[1] for e in entries], dtype=torch.long),
            torch.tensor([e[2] for e in entries], dtype=torch.float32),
        )
    sample, kind = draw(st.integers(0, 3)), draw(st.sampled_from(["image", "video"]))
    return SpanSelection(length, torch.tensor(kept), merge, sample, kind)


@given(st.lists(spans(), max_size=4))
def test_json_round_trip(rows):
    before = Selection(tuple(rows))
    after = Selection.from_dict(json.loads(json.dumps(before.to_dict())))
    assert len(after) == len(before)
    for a, b in zip(before, after, strict=True):
        assert (a.length, a.sample, a.kind) == (b.length, b.sample, b.kind)
        assert torch.equal(a.kept, b.kept)
        assert (a.merge is None) == (b.merge is None)
        if a.merge is not None:
            assert all(torch.equal(getattr(a.merge, f), getattr(b.merge, f)) for f in ("target", "source", "weight"))


@given(spans(merged=False))
def test_apply_gathers(span):
    x = torch.randn(span.length, 3)
    assert torch.equal(span.apply(x), x[span.kept])
    ids = torch.arange(span.length) + 100
    assert span.apply(ids).tolist() == [100 + i for i in span.kept.tolist()]
    assert span.is_identity == (span.kept.tolist() == list(range(span.length)))


@given(spans(merged=True))
def test_merge_equals_a_dense_matrix(span):
    x = torch.randn(span.length, 2, 3)
    dense = torch.zeros(len(span), span.length, dtype=torch.float64)
    for t, s, w in zip(span.merge.target, span.merge.source, span.merge.weight, strict=True):
        dense[t, s] += float(w)
    expected = torch.einsum("ks,sij->kij", dense, x.double())
    torch.testing.assert_close(span.apply(x).double(), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(span.anchors(x), x[span.kept])
    assert not span.is_identity


def test_merge_computes_in_single_precision_and_keeps_the_type():
    span = SpanSelection(1000, torch.tensor([0]), Merge(torch.zeros(1000, dtype=torch.long), torch.arange(1000),
                                                        torch.full((1000,), 1e-3)))  # fmt: skip
    out = span.apply(torch.ones(1000, 1, dtype=torch.float16))
    assert out.dtype == torch.float16
    assert out.item() == 1.0


def test_gradients_flow_through_apply():
    x = torch.randn(4, 2, requires_grad=True)
    merge = Merge(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 3]), torch.tensor([0.25, 0.75, 1.0]))
    SpanSelection(4, torch.tensor([0, 3]), merge).apply(x).sum().backward()
    assert x.grad[:, 0].tolist() == [0.25, 0.75, 0.0, 1.0]


def test_wrong_plane_is_refused():
    with pytest.raises(InputError, match="for 5 tokens; the plane has 4 rows"):
        SpanSelection(5, torch.tensor([1])).apply(torch.zeros(4, 2))


def test_rows_behind_the_span_are_there_to_merge_from():
    """A method may merge what the encoder made beside the tokens, such as that of `[CLS]`."""
    merge = Merge(torch.tensor([0, 0]), torch.tensor([1, 4]), torch.tensor([1.0, 2.0]))
    span = SpanSelection(4, torch.tensor([1]), merge, extra=1)
    span.check()
    x = torch.arange(5.0)[:, None]
    assert span.apply(x).tolist() == [[1.0 + 2 * 4.0]]
    with pytest.raises(InputError, match="4 tokens; the plane has 3 rows"):
        span.apply(x[:3])
    after = SpanSelection.from_dict(json.loads(json.dumps(span.to_dict())))
    assert (after.extra, after.apply(x).tolist()) == (1, [[9.0]])


def test_nothing_kept_survives_json():
    span = SpanSelection.from_dict(json.loads(json.dumps(SpanSelection(4, torch.arange(0)).to_dict())))
    assert span.kept.dtype == torch.long
    assert span.apply(torch.zeros(4, 2)).shape == (0, 2)


def test_apply_over_spans_and_by_prompt():
    first, second = SpanSelection(3, torch.tensor([2]), sample=1), SpanSelection(2, torch.tensor([0, 1]), sample=0)
    selection = Selection((first, second))
    a, b = selection.apply([torch.arange(3), torch.arange(2)])
    assert (a.tolist(), b.tolist()) == ([2], [0, 1])
    assert selection.by_prompt(3) == [[second], [first], []]
    assert selection[0] is first
    assert not selection.is_identity
    assert Selection((second,)).is_identity
    with pytest.raises(ValueError, match="zip"):
        selection.apply([torch.arange(3)])


def entry(target, source, weight):
    return {"target": target, "source": source, "weight": weight}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept": [1, 1]}, "ascend"),
        ({"kept": [2, 1]}, "ascend"),
        ({"kept": [0, 2, 1]}, "ascend"),
        ({"kept": [4]}, "0..3"),
        ({"kept": [-1, 2]}, "ascend"),
        ({"kept": [[0]]}, "one int64 vector"),
        ({"merge": entry([0], [0, 1], [1.0])}, "different lengths"),
        ({"merge": entry([2], [0], [1.0])}, "outside"),
        ({"merge": entry([0], [4], [1.0])}, "outside"),
        ({"merge": entry([-1], [0], [1.0])}, "outside"),
    ],
)
def test_bad_data_is_refused(changes, message):
    good = {"length": 4, "kept": [0, 2], "sample": 0, "kind": "image"}
    SpanSelection.from_dict(good)
    with pytest.raises(InputError, match=message):
        SpanSelection.from_dict({**good, **changes})
