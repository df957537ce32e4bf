from __future__ import annotations

import numpy as np
import torch

from foveate.core.selection import Merge, SpanSelection
from foveate.viz.fate import fate, first_kept


def _merging(length: int, kept: list[int], flows: list[tuple[int, int, float]], extra: int = 0) -> SpanSelection:
    target, source, weight = zip(*flows, strict=True)
    merge = Merge(torch.tensor(target), torch.tensor(source), torch.tensor(weight))
    return SpanSelection(length, torch.tensor(kept), merge, extra=extra)


def test_pruned_tokens_are_kept_or_dropped() -> None:
    shown = fate(SpanSelection(6, torch.tensor([1, 4])))
    assert shown.into.tolist() == [-1, 0, -1, -1, 1, -1]
    assert shown.places.tolist() == [False, True, False, False, True, False]
    assert shown.shared().max() == -1
    assert shown.counts() == {"kept": 2, "merged": 0, "dropped": 4}


def test_merged_tokens_belong_to_the_token_that_most_of_them_flows_into() -> None:
    flows = [(0, 0, 1.0), (1, 3, 1.0), (0, 1, 0.2), (1, 1, 0.7), (0, 2, 0.5), (1, 2, 0.5), (1, 4, 0.0)]
    shown = fate(_merging(6, [0, 3], flows))
    assert shown.into.tolist() == [0, 1, 0, 1, -1, -1]
    assert shown.shared().tolist() == [0, 1, 0, 1, -1, -1]
    assert shown.counts() == {"kept": 2, "merged": 2, "dropped": 2}


def test_tokens_that_are_kept_by_themselves_share_nothing() -> None:
    shown = fate(_merging(4, [0, 2], [(0, 0, 1.0), (1, 2, 0.5), (1, 3, 0.5)]))
    assert shown.shared().tolist() == [-1, -1, 1, 1]


def test_the_cls_token_is_no_patch_of_the_picture() -> None:
    shown = fate(_merging(3, [0, 2], [(0, 3, 1.0), (1, 2, 1.0)], extra=1))
    assert shown.places.tolist() == [True, False, True]
    assert shown.alive.tolist() == [False, False, True]
    assert shown.counts() == {"kept": 2, "merged": 0, "dropped": 1}


def test_order_is_the_first_selection_that_keeps_a_token() -> None:
    rows = [SpanSelection(5, torch.tensor(kept)) for kept in ([3], [0, 1], [0, 3, 4])]
    np.testing.assert_array_equal(first_kept(rows), [1, 1, -1, 0, 2])
