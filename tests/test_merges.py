"""Merges one after the other come to what they do one at a time."""

import pytest
import torch

from foveate.core.merges import composed
from foveate.core.selection import Merge, SpanSelection


def _chosen(n, kept, merged, generator):
    if not merged:
        return SpanSelection(n, kept)
    source = torch.arange(n)
    target = torch.randint(len(kept), (n,), generator=generator)
    return SpanSelection(n, kept, Merge(target, source, torch.rand(n, generator=generator)))


@pytest.mark.parametrize(
    "merged", [(True, True, True), (True, False, True), (False, True, False), (False, False, False)]
)
def test_cuts_compose(merged):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=generator)
    places, merge, plane = torch.arange(20), None, x
    for count, merging in zip((14, 9, 4), merged, strict=True):
        kept = torch.randperm(len(plane), generator=generator)[:count].sort().values
        chosen = _chosen(len(plane), kept, merging, generator)
        plane, merge = chosen.apply(plane), composed(merge, places, chosen)
        places = places[kept]
    assert (merge is None) == (not any(merged))
    torch.testing.assert_close(SpanSelection(20, places, merge).apply(x), plane)
