"""What the generic family reads in vision towers that no family describes, against plain attention maps."""

import pytest
import torch
import transformers as hf
from oracle_tower import reference

import foveate
from foveate.core.errors import InputError, UnsupportedModelError
from foveate.core.probes import Attention, Embeddings, Features, Keys
from foveate.families import family_of
from foveate.families.generic import Generic
from foveate.families.survey import Tower
from foveate.families.tracing import flow, touched
from foveate.methods import DivPrune, HiPrune, VisPruner
from tiny import IMAGE, collate, model, samples
from tiny_families.base import spread, text_shape
from tiny_families.generic_classes import GENERICS, VISION

every_class = pytest.mark.parametrize("name", GENERICS)
TOLD = ["aya_vision", "gemma3", "glm4v", "idefics3", "internvl", "lfm2_vl", "llava", "mistral3", "paligemma", "pixtral"]
"""Families that say themselves what they read, and whose models the generic family takes as well."""


def look(net, inputs, *probes):
    family = Generic.of(net)
    with torch.no_grad():
        return family.encode(net, inputs, family.spans_for(net, inputs, probes), probes)


def joined(tokens, probe):
    return torch.cat(tokens.probe(probe))


@every_class
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_plain_attention_maps(name, attention):
    net, inputs = model(name, attention), collate(samples(name))
    tokens = look(net, inputs, Attention(), Attention(of="received"), Keys())
    patches = GENERICS[name].patches(inputs)
    lead = int(name == "qianfan_ocr")
    plain = reference(net, inputs, lead)
    for probe, values in (
        (Attention(of="received"), plain.received),
        (Attention(), plain.cls if lead else plain.received),
        (Keys(), plain.keys),
    ):
        expected = torch.stack([values[row].mean(dim=0) for row in patches])
        torch.testing.assert_close(joined(tokens, probe).double(), expected, atol=1e-5, rtol=1e-5)
    assert [len(x) for x in tokens.probe(Features())] == [len(x) for x in tokens.probe(Attention())]


@every_class
def test_a_picture_is_read_alone_as_among_others(name):
    net = model(name)
    tokens, start = look(net, collate(samples(name)), Attention(), Keys()), 0
    for row in samples(name):
        alone = look(net, collate([row]), Attention(), Keys())
        n = len(alone.spans)
        for probe in (Attention(), Keys()):
            for a, b in zip(alone.probe(probe), tokens.probe(probe)[start : start + n], strict=True):
                torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
        start += n


@pytest.mark.parametrize("name", TOLD)
def test_equals_families_that_know_the_tower(name):
    net, inputs = model(name), collate(samples(name))
    family = family_of(net)
    probes = (Attention(), Attention(of="received"), Keys(), Attention(of="received", layers=0.34))
    with torch.no_grad():
        own = family.encode(net, inputs, family.spans(net, inputs), probes)
    found = look(net, inputs, *probes)
    for probe in probes:
        torch.testing.assert_close(joined(found, probe), joined(own, probe), atol=1e-6, rtol=1e-5)


@every_class
def test_half_precision_finds_the_same_tokens(name):
    net, inputs = model(name), collate(samples(name))
    half = {k: x.bfloat16() if x.is_floating_point() else x for k, x in inputs.items()}
    whole = joined(look(net, inputs, Attention()), Attention())
    found = joined(look(model(name, dtype=torch.bfloat16), half, Attention()), Attention())
    assert torch.corrcoef(torch.stack([whole, found]))[0, 1] > 0.95


def test_layers_count_by_whole_pictures_where_others_see_windows(monkeypatch):
    net = model("exaone4_5")
    inputs = collate(samples("exaone4_5"))
    shares = look(net, inputs, Attention(of="received", layers=(0.34,)), Attention(of="received"))
    assert torch.equal(
        joined(shares, Attention(of="received", layers=(0.34,))), joined(shares, Attention(of="received"))
    )
    monkeypatch.setattr(Tower, "whole_layers", lambda _: None)
    with pytest.raises(UnsupportedModelError, match="the configuration does not say which"):
        look(net, inputs, Attention(of="received", layers=(0.34,)))


def test_nothing_is_left_behind():
    net, inputs = model("gemma4"), collate(samples("gemma4"))
    before = {m: dict(m._forward_hooks) for m in net.modules()}
    names = {id(m.config): m.config._attn_implementation for m in net.modules() if hasattr(m, "config")}
    reduced = foveate.reduce(net, inputs, VisPruner(keep=5))
    assert torch.is_grad_enabled()
    rows = reduced["mm_encoder_outputs"]["image"].pooler_output
    torch.cat(list(rows)).sum().backward()
    assert net.model.embed_vision.embedding_projection.weight.grad.abs().sum() > 0
    for m in net.modules():
        assert set(before[m]) <= set(m._forward_hooks)
        assert not m._forward_pre_hooks
        if hasattr(m, "config"):
            assert m.config._attn_implementation == names[id(m.config)]


@every_class
def test_encodes_once_where_the_layout_is_known(name):
    net, inputs, calls = model(name), collate(samples(name)), []
    Generic.of(net).towers[0].layers[0].register_forward_hook(lambda *_: calls.append(1))
    for expected in (2, 3):
        with torch.inference_mode():
            foveate.reduce(net, inputs, VisPruner(keep=3), positions="compact")
        assert len(calls) == expected


def test_embeddings_and_features_are_the_tokens():
    net, inputs = model("kimi_k25"), collate(samples("kimi_k25"))
    tokens = look(net, inputs, Embeddings(), Attention())
    plain = net.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True).pooler_output
    for probe in (Features(), Embeddings()):
        torch.testing.assert_close(joined(tokens, probe), torch.cat(plain))


def test_pixels_that_are_not_finite_are_named():
    net, inputs = model("gemma4"), collate(samples("gemma4"))
    inputs["pixel_values"][1, 3] = torch.nan
    with pytest.raises(InputError, match="image 0 of prompt 1"):
        foveate.reduce(net, inputs, VisPruner(keep=5))


def aria():
    return hf.AriaForConditionalGeneration(
        hf.AriaConfig(
            vision_config=hf.Idefics3VisionConfig(**VISION, image_size=32, patch_size=4),
            text_config=hf.AriaTextConfig(**text_shape(), moe_num_experts=2, moe_topk=1),
            projector_patch_to_query_dict={64: 16}, image_token_index=IMAGE,
        )
    ), {"pixel_mask": torch.ones(1, 32, 32, dtype=torch.bool)}, 16  # fmt: skip


def idefics2():
    perceiver = {
        "hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
        "resampler_head_dim": 16, "num_key_value_heads": 2,
    }  # fmt: skip
    vision = {**VISION, "image_size": 32, "patch_size": 4}
    return hf.Idefics2ForConditionalGeneration(
        hf.Idefics2Config(
            vision_config=vision, text_config=hf.MistralConfig(**text_shape()), perceiver_config=perceiver,
            image_token_id=IMAGE,
        )
    ), {}, 4  # fmt: skip


def step3p7():
    text = {
        **text_shape(), "head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 2, "num_local_experts": 2,
        "num_experts_per_tok": 1, "share_expert_dim": 16, "layer_types": ["full_attention"] * 2,
        "mlp_layer_types": ["dense"] * 2, "sliding_window": 16,
    }  # fmt: skip
    vision = {**VISION, "image_size": 32, "patch_size": 4, "max_position_embeddings": 64}
    return hf.Step3p7ForConditionalGeneration(
        hf.Step3p7Config(vision_config=vision, text_config=text, image_token_id=IMAGE)
    ), {}, 4  # fmt: skip


def unlimited_ocr():
    if not hasattr(hf, "UnlimitedOcrConfig"):
        pytest.skip("came later than this transformers")
    sam = {
        "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 2, "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 48, "downsample_channels": [16, 32],
    }  # fmt: skip
    text = {**text_shape(), "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    return hf.UnlimitedOcrForConditionalGeneration(
        hf.UnlimitedOcrConfig(
            vision_config={"sam_config": sam, "encoder_config": {**VISION, "image_size": 16, "patch_size": 4}},
            text_config=text, image_token_id=IMAGE,
        )
    ), {}, 21  # fmt: skip


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (aria, "a resampler, cross-attention or an overlapping filter"),
        (idefics2, "a resampler, cross-attention or an overlapping filter"),
        (step3p7, "a resampler, cross-attention or an overlapping filter"),
        (unlimited_ocr, "5 of 21 tokens are made of no patch"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_towers_that_do_not_tell_tokens_apart_are_refused(build, reason):
    net, side, tokens = build()
    spread(net)
    shape = (1, 1, 3, 32, 32) if build is idefics2 else (1, 3, 32, 32)
    inputs = {"input_ids": torch.tensor([[1, *[IMAGE] * tokens, 5]]), "pixel_values": torch.randn(shape), **side}
    foveate.reduce(net, inputs, DivPrune(keep=3))
    with pytest.raises(UnsupportedModelError, match=rf"{reason}.*such as 'divprune'"):
        foveate.reduce(net, inputs, VisPruner(keep=3))


def test_towers_whose_attention_is_their_own_are_refused_when_attaching():
    vision = {
        **VISION, "output_channels": 32, "image_size": 64, "patch_size": 4, "window_size": 4,
        "global_attn_indexes": [1], "mlp_dim": 48,
    }  # fmt: skip
    net = hf.GotOcr2ForConditionalGeneration(
        hf.GotOcr2Config(
            vision_config=vision, text_config=hf.Qwen2Config(**text_shape()), image_token_index=IMAGE
        )
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="needs the attention layers of the vision encoder"):
        foveate.attach(net, VisPruner(keep=9))
    foveate.attach(net, DivPrune(keep=9)).detach()


def test_attention_that_is_not_that_of_queries_and_keys_is_refused():
    def biased(module, query, key, value, attention_mask, **kwargs):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        bias = torch.linspace(0, 1, key.shape[2]).expand(len(query), 1, query.shape[2], -1)
        return sdpa_attention_forward(module, query, key, value, bias, **kwargs)

    hf.AttentionInterface.register("biased", biased)
    net, inputs = model("kimi_k25"), collate(samples("kimi_k25"))
    net.model.vision_tower.set_attn_implementation("biased")
    with pytest.raises(UnsupportedModelError, match="more than queries, keys and a mask tell"):
        look(net, inputs, Attention())


def test_layers_of_other_positions_are_refused():
    """A tower that shuffles its patches between two layers: those in front of it are in another order."""
    net, inputs = model("kimi_k25"), collate(samples("kimi_k25"))
    net.model.vision_tower.layers[1].register_forward_pre_hook(lambda _, args: (args[0].flip(0),))
    assert joined(look(net, inputs, Attention()), Attention()).sum() > 0
    with pytest.raises(UnsupportedModelError, match=r"layer 0 .* has other positions than layer 2"):
        foveate.reduce(net, inputs, HiPrune(keep=5, object_layer=0.0))


def test_flow_follows_any_partition():
    generator = torch.Generator().manual_seed(1)
    source = torch.randn(700, 6, requires_grad=True, generator=generator)
    order = torch.randperm(600, generator=generator)
    rows = torch.tanh(source[order].reshape(150, 4 * 6) @ torch.randn(24, 8, generator=generator))
    way = flow(rows, [source])
    expected = torch.full((700,), -1)
    expected[order] = torch.arange(600) // 4
    assert not way.mixes
    assert torch.equal(way.row, expected)
    assert touched(rows, [source, torch.ones(2, requires_grad=True)]) == [True, False]
    assert flow(rows + 0.1 * rows.roll(1, 0), [source]).mixes
    with pytest.raises(InputError, match="not finite"):
        flow(rows * torch.nan, [source])


def test_training_changes_nothing_of_what_is_found():
    net = model("generic").train()
    for attention in (m for m in net.model.vision_encoder.modules() if hasattr(m, "dropout")):
        attention.dropout = 0.5
    net.gradient_checkpointing_enable({"use_reentrant": True})
    tokens = look(net, collate(samples("generic")), Attention())
    assert all(module.training for module in net.modules())
    again = look(net.eval(), collate(samples("generic")), Attention())
    assert list(map(len, tokens.probe(Attention()))) == list(map(len, again.probe(Attention())))
