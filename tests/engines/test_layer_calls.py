"""LLMs that call their layers in another way, or let layers share keys: Gemma 4, by the generic path."""

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

import foveate
from foveate.core.errors import UnsupportedModelError
from foveate.methods import FastV, PyramidDrop
from tiny_families.base import spread

gemma4 = pytest.importorskip("transformers.models.gemma4")
IMAGE, VISUAL, DEPTH = 120, 9, 4


def build(shared=0):
    torch.manual_seed(0)
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": DEPTH, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "vocab_size": 128, "pad_token_id": 0,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128, "num_kv_shared_layers": shared,
        "layer_types": ["full_attention"] * DEPTH,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 8, "patch_size": 4, "pooling_kernel_size": 2,
    }  # fmt: skip
    config = gemma4.Gemma4Config(text_config=text, vision_config=vision, audio_config=None, image_token_id=IMAGE)
    return spread(gemma4.Gemma4ForConditionalGeneration(config)).eval()


def prompt():
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, 110, (1, 12), generator=generator)
    ids = torch.cat([words[:, :4], torch.full((1, VISUAL), IMAGE), words[:, 4:]], dim=1)
    rows = torch.randn(VISUAL, 32, generator=generator)
    return ids, {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).long(),
        "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=[rows])},
    }


def masked(net, ids, inputs, kept, boundary):
    """Run the plain model with the dropped columns hidden from the layers behind a boundary."""
    columns = (ids[0] == IMAGE).nonzero().flatten()
    visible = torch.ones(ids.shape[1], dtype=torch.bool)
    visible[columns] = False
    visible[columns[kept]] = True
    size = ids.shape[1]
    seen = (torch.ones(size, size, dtype=torch.bool).tril() & visible) | torch.eye(size, dtype=torch.bool)
    mask = torch.zeros(1, 1, size, size).masked_fill(~seen, torch.finfo(torch.float32).min)

    def hide(module, args, kwargs):
        return args, {**kwargs, "attention_mask": mask}

    hooks = [x.register_forward_pre_hook(hide, with_kwargs=True) for x in net.get_decoder().layers[boundary:]]
    try:
        return net(**inputs, use_cache=False).logits[0, -1]
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(("shared", "layer"), [(0, 1), (0, 2), (0, 3), (2, 1)])
@pytest.mark.parametrize("cached", [True, False])
@torch.no_grad()
def test_inputs_by_place_are_cut_as_well(shared, layer, cached):
    net, (ids, inputs) = build(shared), prompt()
    with foveate.attach(net, FastV(keep=3, layer=layer)) as handle:
        found = net(**inputs, use_cache=cached).logits[0, -1]
        text = net(input_ids=ids[:, :4]).logits
    kept = handle.selections[0][0].kept
    torch.testing.assert_close(found, masked(net, ids, inputs, kept, layer), atol=1e-4, rtol=0)
    torch.testing.assert_close(text, net(input_ids=ids[:, :4]).logits)


@pytest.mark.parametrize(
    "reducer", [FastV(keep=3, layer=2), FastV(keep=3, layer=3), PyramidDrop(layers=(1, 2))], ids=repr
)
def test_boundaries_behind_shared_keys_are_refused(reducer):
    with pytest.raises(UnsupportedModelError, match=r"attend to what layer 1 keeps.*use a layer up to 1"):
        foveate.attach(build(2), reducer)
