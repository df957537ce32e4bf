"""Attention that all tokens of a large picture receive is summed up by blocks of rows, never as a whole map."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from foveate.bench.memory import MemoryMeter
from foveate.core import probes
from foveate.core.probes import Attention, attention_received
from foveate.families.tower import run_tower


def peak(net, pixels, wanted):
    meter = MemoryMeter(torch.device("cpu"))
    try:
        with torch.no_grad():
            run_tower(net, pixels, [-1], True, wanted)
        meter.stop("select")
        return meter.peaks()["select"]
    finally:
        meter.close()


@pytest.mark.slow
@pytest.mark.parametrize("side", [64, 128])
def test_received_attention_takes_at_most_as_much_again_as_the_tower(side):
    """The sides of a picture in patches, 16,384 in all of the larger one; a layer is as wide as CLIP-L's."""
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=1, num_attention_heads=16, image_size=14 * side,
        patch_size=14,
    )  # fmt: skip
    net, pixels = CLIPVisionModel(config).eval(), torch.randn(1, 3, 14 * side, 14 * side)
    assert peak(net, pixels, [Attention(of="received")]) < 2 * peak(net, pixels, [])


@pytest.mark.parametrize("entries", [1, 500, 10**9])
def test_blocks_of_any_size_give_the_same_sums(entries, monkeypatch):
    query, key = torch.randn(2, 2, 3, 41, 8)
    mask = (torch.arange(41) < torch.tensor([[41], [30]]))[:, None, None]
    whole = (query @ key.mT * 0.3).masked_fill(~mask, -torch.inf).softmax(dim=-1)
    expected = torch.stack([whole[0].mean(dim=(0, 1)), whole[1, :, :30].mean(dim=(0, 1))])[:, 1:]
    monkeypatch.setattr(probes, "_ENTRIES", entries)
    torch.testing.assert_close(attention_received(query, key, 0.3, 1, mask), expected)
