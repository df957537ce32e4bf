"""LLaVA with other towers than CLIP's."""

import pytest
import torch
from by_hand import check_boxes, check_inside, received, saliency
from transformers import LlavaConfig, LlavaForConditionalGeneration

import foveate
from foveate.core.errors import UnsupportedModelError
from foveate.families import family_of
from foveate.methods import Downsample, Random
from tiny import IMAGE, collate, samples
from tiny_families.base import clip_config, llama_config, siglip_config, spread


def build(strategy="full", tower=None, layer=-1):
    net = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=tower or siglip_config(), text_config=llama_config(), image_token_id=IMAGE,
            vision_feature_layer=layer, vision_feature_select_strategy=strategy,
        )
    )  # fmt: skip
    return spread(net)


@pytest.mark.parametrize("layer", [-1, -2])
def test_siglip_has_no_cls_token(layer):
    net, inputs = build(layer=layer), collate(samples("llava"))
    spans = family_of(net).spans(net, inputs)
    assert [len(s) for s in spans] == [64] * 4
    assert all(len(s.separators()) == 0 for s in spans)
    reduced = foveate.reduce(net, inputs, Random(keep=9))
    with torch.no_grad():
        whole = net.get_image_features(inputs["pixel_values"]).pooler_output
    for got, x, chosen in zip(
        reduced["mm_encoder_outputs"]["image"].pooler_output, whole, reduced.selection, strict=True
    ):
        torch.testing.assert_close(got, x[chosen.kept], atol=1e-5, rtol=1e-5)
    net.set_attn_implementation("eager")
    patches = received(net.model.vision_tower, layer, pixel_values=inputs["pixel_values"])
    torch.testing.assert_close(torch.stack(saliency(net, inputs)), patches)


@pytest.mark.parametrize("layer", [-1, -2])
def test_methods_inside_siglip(layer):
    net, inputs = build(layer=layer), collate(samples("llava"))
    with torch.no_grad():
        states = net.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    check_inside(net, inputs, states[layer], 9)


def test_siglip_takes_smaller_pictures():
    net, inputs = build(), collate(samples("llava")[:1])
    (embeds,) = foveate.reduce(net, inputs, Downsample(keep=16))["mm_encoder_outputs"]["image"].pooler_output
    assert embeds.shape == (16, 32)


@pytest.mark.parametrize("tower", [siglip_config(), clip_config()], ids=["siglip", "clip"])
def test_tokens_are_where_their_boxes_are(tower):
    net = build("full" if "siglip" in tower.model_type else "default", tower)
    assert check_boxes(net, collate(samples("llava")[:1]), [(32, 32)]) == 64


def test_what_is_refused():
    net, inputs = build("default"), collate(samples("llava"))
    with pytest.raises(UnsupportedModelError, match="no \\[CLS\\] token there: use 'full'"):
        foveate.reduce(net, inputs, Random(keep=3))
    net.config.vision_config.model_type = "dinov2"
    with pytest.raises(UnsupportedModelError, match="not with 'dinov2'"):
        foveate.reduce(net, inputs, Random(keep=3))
