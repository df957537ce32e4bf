"""Weights that are quantised are read through their modules, whose own ``forward`` knows what they mean."""

import copy

import pytest
import torch
from torch import nn

import foveate
from foveate.core.errors import FoveateError
from tiny import FAMILIES, collate, in_depth, make, method_id, model, samples


class Int8Linear(nn.Module):
    """Keeps int8 weights and their scales, as modules of bitsandbytes do, and has no `weight`."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()
        self.register_buffer("SCB", weight.abs().amax(dim=1, keepdim=True) / 127)
        self.register_buffer("CB", (weight / self.SCB).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.CB.to(x.dtype) * self.SCB, self.bias)


def int8(net):
    """Quantise the linear layers of a model, and return it and one that has the same weights in float32."""
    quantised, plain = copy.deepcopy(net), copy.deepcopy(net)
    for name, module in net.named_modules():
        if type(module) is nn.Linear:
            other = Int8Linear(module)
            quantised.set_submodule(name, other)
            plain.get_submodule(name).weight.data = other.CB * other.SCB
    return quantised, plain


@pytest.mark.parametrize("entry", [("downsample", {}), ("visionzip", {}), ("vispruner", {})], ids=method_id)
@pytest.mark.parametrize("family", [pytest.param(name, marks=in_depth(name)) for name in FAMILIES])
@torch.no_grad()
def test_int8_layers(family, entry):
    (quantised, plain), inputs = int8(model(family)), collate(samples(family))
    try:
        quantised(**inputs)
    except AttributeError as error:
        pytest.skip(f"the stock model reads a weight of its own: {error}")
    reducer = make(entry, 9, family)
    if foveate.families.family_of(plain).lacks(reducer):
        pytest.skip("not on this family")
    with foveate.attach(plain, reducer):
        expected = plain(**inputs).logits
    with foveate.attach(quantised, reducer):
        torch.testing.assert_close(quantised(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


def dynamic():
    """Return LLaVA with a projector whose activations are quantised on the way, too, by the widest row of a call."""
    net = copy.deepcopy(model("llava"))
    projector = torch.ao.quantization.quantize_dynamic(net.model.multi_modal_projector, {nn.Linear}, torch.qint8)
    net.model.multi_modal_projector = projector
    return net


@torch.no_grad()
def test_dynamically_quantised_layers():
    net, inputs = dynamic(), collate(samples("llava"))
    reduced = foveate.reduce(net, inputs, "uniform", keep=9)
    every = net.get_image_features(inputs["pixel_values"]).pooler_output
    rows = torch.cat(list(reduced["mm_encoder_outputs"]["image"].pooler_output))
    expected = torch.cat([span.apply(x) for span, x in zip(reduced.selection, every, strict=True)])
    assert (rows - expected).norm() < 0.05 * expected.norm()
    with foveate.attach(net, "downsample", keep=9):
        assert net(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("quantised", [lambda: int8(model("llava"))[0], dynamic], ids=["int8", "dynamic"])
def test_a_codebook_needs_the_projector_as_it_was(quantised):
    net = quantised()
    with pytest.raises(FoveateError, match=r"the projector has quantised weights .*: leave the projector out"):
        foveate.attach(net, make(("codebook", {}), 9, "llava"))
    foveate.attach(net, "uniform", keep=9).detach()
