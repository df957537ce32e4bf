"""What kept tokens stand for: the toy of the method's description, and what holds for every selection."""

import math

import pytest
import torch

from foveate.core import rectify
from foveate.core.rectify import Group, absorbed, bias, groups_of, homes, shares
from foveate.core.selection import Merge, SpanSelection
from foveate.core.spans import Crop
from foveate.engines.pipeline import decide
from foveate.engines.settings import Settings
from tiny import METHODS, make, method_id, visual_tokens

TOKENS = torch.tensor(
    [
        [1, 0, 0], [1, 0.1, 0], [1, 0, 0.1], [0.9, 0.05, 0], [0.2, 1, 0], [0, 1, 0.1], [1, 0.1, 0.1], [0, 0.1, 1],
        [0.1, 1, 0.3], [1, 0, 0.05], [1, 0.05, 0], [0.6, 0.8, 0],
    ]
)  # fmt: skip
KEPT = torch.tensor([4, 5, 6, 7, 8, 11])
WHOLE = [Group(torch.arange(12), torch.arange(6))]


def test_toy():
    assert KEPT[homes(TOKENS, KEPT)].tolist() == [6, 6, 6, 6, 4, 5, 6, 7, 8, 6, 6, 11]
    found = shares(WHOLE, SpanSelection(12, KEPT), TOKENS)
    assert found.counts.tolist() == [1, 1, 7, 1, 1, 1]
    raised = bias(found, 0.5, guard=math.inf)
    torch.testing.assert_close(raised, torch.tensor([0, 0, 0.972955, 0, 0, 0]))
    logits = TOKENS[KEPT] @ torch.tensor([1.0, 0, 0]) / math.sqrt(3)
    plain, rectified = (x.softmax(0) for x in (logits, logits + raised))
    near = {"atol": 6e-5, "rtol": 0}
    torch.testing.assert_close(plain, torch.tensor([0.1521, 0.1356, 0.2415, 0.1356, 0.1436, 0.1917]), **near)
    torch.testing.assert_close(rectified, torch.tensor([0.1089, 0.0970, 0.4572, 0.0970, 0.1028, 0.1372]), **near)
    new = absorbed(TOKENS[KEPT], found, TOKENS)
    torch.testing.assert_close(new[2], torch.tensor([1.0083, 0.0438, 0.0365]), **near)
    assert torch.equal(new[[0, 1, 3, 4, 5]], TOKENS[KEPT][[0, 1, 3, 4, 5]])


def test_guard():
    found = shares(WHOLE, SpanSelection(12, KEPT), TOKENS)
    assert math.isclose(float(bias(found, 0.5)[2]), 1.5 * 0.5 * math.log(12 / 6), rel_tol=1e-6)


def test_ties_go_to_the_lower_rank_and_kept_tokens_stay_at_home():
    tokens = torch.ones(7, 4)
    assert homes(tokens, torch.tensor([1, 4])).tolist() == [0, 0, 0, 0, 1, 0, 0]


def test_tiles_decide_alike(monkeypatch):
    tokens = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    kept = torch.arange(0, 100, 9)
    whole = homes(tokens, kept)
    monkeypatch.setattr(rectify, "_ROWS", 7)
    assert torch.equal(homes(tokens, kept), whole)


def test_crops_keep_to_themselves_unless_one_keeps_nothing():
    tokens = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    crops = [Crop(torch.arange(0, 5), None), Crop(torch.arange(5, 10), None)]
    for kept in ([0, 3, 7], [6, 8, 9]):
        index = torch.tensor(kept)
        groups = groups_of(crops, 10, index)
        assert len(groups) == (2 if kept[0] < 5 else 1)
        found = shares(groups, SpanSelection(10, index), tokens)
        assert found.counts.sum() == 10
        if len(groups) == 2:
            assert found.counts[:2].sum() == 5


def test_shares_of_a_merge_are_summed_and_the_rest_is_at_home():
    tokens = torch.eye(4)[[0, 0, 1, 1, 2, 3]]
    merge = Merge(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 2]), torch.tensor([0.5, 0.9, 0.3, 1.0]))
    found = shares([Group(torch.arange(6), torch.arange(2))], SpanSelection(6, torch.tensor([0, 2]), merge), tokens)
    torch.testing.assert_close(found.merged, torch.tensor([1.75, 1.25]))
    # Token 3 equals the second kept one; 4 and 5 are like none, and go to the first.
    torch.testing.assert_close(found.counts, torch.tensor([3.75, 2.25]))


@pytest.mark.parametrize("entry", METHODS, ids=method_id)
def test_every_method_stands_for_all_tokens(entry):
    reducer = make(entry, 5)
    tokens = visual_tokens(reducer, [(0, [(4, 5)]), (0, [(3, 4), (4, 4)]), (1, [(2, 3)])])
    if reducer.stage != "before_llm":
        pytest.skip("acts on other tokens")
    chosen = decide(tokens, Settings.make(reducer))
    rows = [torch.randn(len(span), 6, generator=torch.Generator().manual_seed(4)) for span in tokens.spans]
    for span, own, found in zip(tokens.spans, chosen, rectify.shares_of(tokens.spans, chosen, rows), strict=True):
        assert found.counts.shape == (len(own),)
        assert math.isclose(float(found.counts.sum()), sum(map(len, span.crops)), rel_tol=1e-5)
        assert bias(found, 0.5).isfinite().all()
        if reducer.merges is None:
            assert (found.counts >= 1).all()
