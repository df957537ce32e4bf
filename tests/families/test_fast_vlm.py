"""FastVLM, whose encoder has no attention to read, and the real towers of timm if it is installed."""

import pytest
import torch
from transformers import FastVlmConfig, FastVlmForConditionalGeneration, PerceptionLMConfig, Qwen2Config
from transformers import PerceptionLMForConditionalGeneration as PerceptionLM

import foveate
from foveate.core.errors import InputError, UnsupportedModelError
from foveate.core.probes import Attention
from foveate.families import family_of
from tiny import IMAGE, VIDEO, VISUALS, collate, model, sample, samples
from tiny_families.base import llama_config, spread, text_shape


@pytest.mark.parametrize("method", ["vispruner", "fastervlm"])
def test_methods_that_read_attention_are_refused(method):
    net, inputs = model("fast_vlm"), collate(samples("fast_vlm"))
    with pytest.raises(UnsupportedModelError, match=r"methods that run on it are: .*pool, .*random, .*uniform"):
        foveate.reduce(net, inputs, method, keep=5)
    with pytest.raises(UnsupportedModelError, match="no attention to read"):
        family_of(net).encode(net, inputs, family_of(net).spans(net, inputs), (Attention(),))


def test_grid_follows_the_shape_of_the_pictures():
    net, inputs = model("fast_vlm"), collate(samples("fast_vlm"))
    spans = family_of(net).spans(net, inputs)
    assert [(s.grid, [c.encoder_row for c in s.crops]) for s in spans] == [((1, 4, 4), [i]) for i in range(4)]
    wide = {
        "input_ids": torch.tensor([[5, *[IMAGE] * 32, 6, *[IMAGE] * 32, 7]]),
        "pixel_values": torch.randn(2, 3, 32, 64),
    }
    assert [s.grid for s in family_of(net).spans(net, wide)] == [(1, 4, 8)] * 2
    for method in ("random", "downsample"):
        reduced = foveate.reduce(net, wide, method, keep=9)
        assert net(**reduced).logits.isfinite().all()


def test_placeholders_that_fit_no_grid():
    net, (picture, *_) = model("fast_vlm"), VISUALS["fast_vlm"]
    inputs = collate([sample(2, picture, 3)])
    inputs["input_ids"][0, 3] = 5
    with pytest.raises(InputError, match="15 image placeholder tokens"):
        family_of(net).spans(net, inputs)


def timm_config(architecture, **settings):
    pytest.importorskip("timm")
    from transformers import TimmWrapperConfig

    return TimmWrapperConfig(architecture=architecture, **settings)


def prompt(tokens, *shape):
    torch.manual_seed(1)
    ids = torch.tensor([[5, 6, *[IMAGE] * tokens, 7, 8, 9]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(*shape)}


@torch.no_grad()
def test_attention_of_a_tower_of_timm():
    settings = {"embed_dim": 32, "depth": 3, "num_heads": 4, "img_size": (64, 64), "patch_size": 8, "global_pool": ""}
    vision = timm_config(
        "vit_pe_core_large_patch14_336", model_args={**settings, "ref_feat_shape": (8, 8)}, do_pooling=False
    )
    net = spread(
        PerceptionLM(
            PerceptionLMConfig(
                vision_config=vision, text_config=llama_config(), image_token_id=IMAGE, video_token_id=VIDEO,
                projector_pooling_ratio=2,
            )
        )
    )  # fmt: skip
    inputs = prompt(48, 1, 3, 3, 64, 64)
    family = family_of(net)
    spans = family.spans(net, inputs)
    got = torch.stack(family.encode(net, inputs, spans, (Attention(),)).probe(Attention()))
    # Without the fused kernel, the map goes through a module that can be watched.
    attention, maps = net.model.vision_tower.timm_model.blocks[-1].attn, []
    attention.fused_attn = False
    attention.attn_drop.register_forward_hook(lambda module, args, output: maps.append(output))
    net.model.vision_tower(inputs["pixel_values"][0])
    row = maps[0].mean(1)[:, 0, 1:].reshape(3, 4, 2, 4, 2)
    torch.testing.assert_close(got, row.mean((2, 4)).flatten(1), atol=1e-6, rtol=1e-4)
    with pytest.raises(UnsupportedModelError, match="fused kernel"):
        foveate.reduce(net, inputs, "vispruner", keep=9)
    attention.fused_attn = True
    assert len(foveate.reduce(net, inputs, "vispruner", keep=9).selection[0]) == 9


def test_fast_vlm_with_its_tower_of_timm():
    vision = timm_config("fastvit_mci3", model_args={"inference_mode": True}, do_pooling=True, hidden_size=3072)
    text = Qwen2Config(**text_shape())
    net = FastVlmForConditionalGeneration(
        FastVlmConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    ).eval()
    inputs = prompt(16, 1, 3, 256, 256)
    for method in ("uniform", "downsample"):
        reduced = foveate.reduce(net, inputs, method, keep=9)
        assert net(**reduced).logits.shape == (1, 14, 128)
