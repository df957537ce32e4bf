"""VipLLaVA: features of several layers, attention of the last of them."""

import torch

from foveate.core.probes import Attention, Features
from foveate.families import family_of
from tiny import collate, model, samples


@torch.no_grad()
def test_probes():
    net, eager, inputs = model("vipllava"), model("vipllava", "eager"), collate(samples("vipllava"))
    family = family_of(net)
    tokens = family.encode(net, inputs, family.spans(net, inputs), (Features(), Attention()))
    tower = eager.model.vision_tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    # Layers -2, -3 and 1 of four: hidden states 3, 2 and 1, of which the first comes from the third layer.
    expected = torch.cat([tower.hidden_states[i][:, 1:] for i in (3, 2, 1)], dim=-1)
    torch.testing.assert_close(torch.stack(tokens.probe(Features())), expected, atol=1e-5, rtol=1e-5)
    row = tower.attentions[2].mean(1)[:, 0, 1:]
    torch.testing.assert_close(torch.stack(tokens.probe(Attention())), row, atol=1e-6, rtol=1e-4)
