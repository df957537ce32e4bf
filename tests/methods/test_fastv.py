"""FastV: the specification's toy with its four queries, counts, and budgets per layer."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import layer_tokens

import foveate
from foveate.core.errors import BudgetError, FoveateError, UnsupportedModelError
from foveate.core.in_llm import tokens_per_layer
from foveate.core.probes import LayerAttention
from foveate.core.rows import Rows
from foveate.core.spans import Crop
from foveate.methods import FastV
from tiny import collate, deep_model, sample

LOGITS = {
    1: ([1, 0], [1, 0]),
    2: ([2, 2, 0], [2, 2, 0]),
    3: ([2, 2, 1, 0], [2, 2, 0, 0]),
    4: ([2, 3, 1, 0, 0], [2, 3, 0, 0, 0]),
    5: ([3, 3, 0, 0, 0, 1], [3, 3, 0, 0, 0, 1]),
    6: ([3, 0, 2, 1, 0, 2, 1], [3, 1, 0, 3, 0, 1, 2]),
}


def toy_rows():
    """Make queries and keys whose products are the toy's logits: keys are unit vectors, queries the rows."""
    query = torch.zeros(1, 2, 7, 7)
    for row, heads in LOGITS.items():
        for head, values in enumerate(heads):
            query[0, head, row, : len(values)] = torch.tensor(values) * math.log(2.0)
    key = torch.eye(7).expand(1, 2, 7, 7)
    return Rows(query, key, 1.0)


def toy_scores(rows):
    block = torch.cat([block for _, block in toy_rows().attention(torch.tensor([rows]))], dim=2)
    return block.mean(dim=(1, 2))[0, 1:5]


@pytest.mark.parametrize(
    ("rows", "scores", "kept"),
    [
        ([6], [0.061189, 0.110140, 0.199301, 0.041958], [1, 2]),
        ([0, 1, 2, 3, 4, 5, 6], [0.302629, 0.072230, 0.058137, 0.022023], [0, 1]),
        ([5, 6], [0.221071, 0.078879, 0.123460, 0.044789], [0, 2]),
    ],
    ids=["last", "all", "text"],
)
def test_toy(rows, scores, kept):
    seen = toy_scores(rows)
    expected = torch.tensor(scores)
    torch.testing.assert_close(seen, expected, atol=1e-6, rtol=0)
    query = {1: "last", 2: "text", 7: "all"}[len(rows)]
    tokens = layer_tokens([4], [2], {LayerAttention(query): [seen]})
    (chosen,) = FastV(keep=2, query=query).select(tokens)
    assert chosen.kept.tolist() == kept


def test_toy_mean_over_the_rows_that_see_a_column():
    """The specification's fourth way to average, which favours early tokens less; no option here."""
    block = torch.cat([b for _, b in toy_rows().attention(torch.arange(1, 7)[None])], dim=2).mean(dim=1)[0]
    seen = torch.stack([block[max(c - 1, 0) :, c].mean() for c in range(1, 5)])
    torch.testing.assert_close(seen, torch.tensor([0.353067, 0.101122, 0.101739, 0.051387]), atol=1e-6, rtol=0)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(0, 5), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_rows_equal_a_plain_reference(batch, groups, length, cached, capped, seed):
    generator = torch.Generator().manual_seed(seed)
    heads, width, keys = 2 * groups, 4, length + cached
    query = torch.randn(batch, heads, length, width, generator=generator)
    key = torch.randn(batch, groups, keys, width, generator=generator)
    rows = torch.randint(0, length, (batch, 3), generator=generator)
    cap = 0.7 if capped else None
    found = torch.cat([b for _, b in Rows(query, key, 0.5, softcap=cap).attention(rows)], dim=2)
    for b in range(batch):
        for h in range(heads):
            for i, row in enumerate(rows[b].tolist()):
                logits = [float(query[b, h, row].double() @ key[b, h // 2, j].double()) * 0.5 for j in range(keys)]
                if cap:
                    logits = [cap * math.tanh(x / cap) for x in logits]
                shown = [math.exp(x) if j <= row + cached else 0.0 for j, x in enumerate(logits)]
                expected = torch.tensor([x / sum(shown) for x in shown])
                torch.testing.assert_close(found[b, h, i], expected, atol=1e-5, rtol=1e-4)


def test_masks_windows_and_chunks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 2, 7, 4, generator=generator) for _ in range(2))
    rows = torch.arange(7).expand(2, -1)
    bool_mask = torch.ones(7, 7, dtype=torch.bool).tril().triu(-2).expand(2, 1, 7, 7)
    additive = torch.zeros(2, 1, 7, 7).masked_fill(~bool_mask, torch.finfo(torch.float32).min)
    plain = torch.cat([b for _, b in Rows(query, key, 1.0, window=3).attention(rows)], dim=2)
    for mask in (bool_mask, additive):
        torch.testing.assert_close(torch.cat([b for _, b in Rows(query, key, 1.0, mask).attention(rows)], 2), plain)
    padding = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1] * 7])
    shown = torch.cat([b for _, b in Rows(query, key, 1.0, padding).attention(rows[:, 1:])], dim=2)
    assert (shown[0, :, :, 0] == 0).all()
    monkeypatch.setattr("foveate.core.rows._CHUNK", 2)
    chunked = torch.cat([b for _, b in Rows(query, key, 1.0, window=3).attention(rows)], dim=2)
    torch.testing.assert_close(chunked, plain)


def test_schedule():
    assert tokens_per_layer(FastV(keep=0.5), 32, 576) == (576,) * 2 + (288,) * 30
    assert FastV(keep=0.5).counts(32, [("image", 577)]) == (288,)  # 288.5, half to even
    assert FastV(keep=0.5).counts(32, [("image", 579)]) == (290,)  # 289.5
    assert FastV(keep=[64, 16]).counts(32, [("image", 576), ("image", 576)]) == (80,)
    assert FastV(keep={"image": 64, "video": 0.5}).counts(32, [("image", 576), ("video", 100)]) == (114,)


@pytest.mark.parametrize(
    ("layer", "equivalent", "keep"),
    [(2, 192, 166), (2, 128, 98), (2, 64, 30), (3, 192, 152), (3, 128, 82), (3, 64, 11)],
)
def test_equivalent_tokens(layer, equivalent, keep):
    solved = FastV(equivalent=equivalent, layer=layer).solved(32, 576)
    assert solved == FastV(keep=keep, equivalent=equivalent, layer=layer)
    assert f"keep={keep}" in repr(solved)
    assert f"equivalent={equivalent}" in repr(solved)
    assert abs(sum(tokens_per_layer(solved, 32, 576)) / 32 - equivalent) < 0.5


def test_bad_parameters():
    with pytest.raises(FoveateError, match="needs a budget"):
        FastV()
    for value in (0, -3, 1.5, "64", True, math.nan, math.inf):
        with pytest.raises(BudgetError):
            FastV(equivalent=value)
    with pytest.raises(FoveateError, match="'last', 'text' or 'all'"):
        FastV(keep=9, query="first")
    with pytest.raises(FoveateError, match="at least 1"):
        FastV(keep=9, layer=0)
    with pytest.raises(FoveateError, match="True or False, not 1"):
        FastV(keep=9, per_image=1)
    for keep in ([64, 16], {"image": 9}):
        with pytest.raises(BudgetError, match="one for all"):
            FastV(keep=keep, per_image=True)
    with pytest.raises(BudgetError, match="earlier layer"):
        tokens_per_layer(FastV(equivalent=30), 32, 576)
    with pytest.raises(UnsupportedModelError, match="layers 0 to 31"):
        tokens_per_layer(FastV(keep=9, layer=32), 32, 576)
    with pytest.raises(BudgetError):
        FastV(keep=0)


def test_images_compete_or_have_their_share():
    attention = torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 2, 0.1, 0.4, 0.3, 0.2])
    last = LayerAttention("last")
    (chosen,) = FastV(keep=3).select(layer_tokens([12], [6], {last: [attention]}))
    assert chosen.kept.tolist() == [0, 1, 2, 3, 4, 5]
    apart = layer_tokens([12], [6], {last: [attention[:8], attention[8:]]})
    crops = tuple(Crop(torch.arange(*ends), None) for ends in ((0, 8), (8, 12)))
    apart = replace(apart, spans=(replace(apart.spans[0], crops=crops),))
    (chosen,) = FastV(keep=3, per_image=True).select(apart)
    assert chosen.kept.tolist() == [0, 1, 2, 3, 9, 10]


@pytest.mark.parametrize("query", ["last", "text", "all"])
def test_images_of_a_prompt_are_cut_alike(query):
    net, inputs = deep_model("llava"), collate([sample(3, "image", 4, "image", 5), sample(2, "image", 9)])
    for reducer in (
        FastV(keep=0.25, query=query, per_image=True),
        FastV(equivalent=0.625, query=query, per_image=True),
    ):
        with foveate.attach(net, reducer) as handle, torch.no_grad():
            net(**inputs)
        assert [[len(span) for span in row] for row in handle.selections] == [[16, 16], [16]]


def test_ties_go_to_the_lower_index():
    tokens = layer_tokens([6, 5], [3, 2], {LayerAttention("last"): [torch.full((6,), 0.1), torch.full((5,), 0.2)]})
    assert [c.kept.tolist() for c in FastV(keep=1).select(tokens)] == [[0, 1, 2], [0, 1]]
