"""Attention methods on classes without a family equal the plain model with dropped columns hidden or absent."""

import pytest
import torch
from oracle import check, generate

import foveate
from foveate.methods import VisPruner
from tiny import GENERICS, collate, model, samples


@pytest.mark.parametrize(("name", "positions"), [(n, p) for n, tiny in GENERICS.items() for p in tiny.positions])
def test_generation_equals_the_oracle(name, positions):
    net, inputs = model(name), collate(samples(name))
    plain = generate(net, inputs)
    with foveate.attach(net, VisPruner(keep=4), positions=positions) as handle:
        out = generate(net, inputs)
    assert [[len(span) for span in row] for row in handle.selections] == [[4], [4, 4], [4]]
    check(net, inputs, out, handle.selections, positions)
    assert (torch.stack(plain.logits) - torch.stack(out.logits)).abs().max() > 0.05
