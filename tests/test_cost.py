from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import foveate
from foveate import VisPruner
from foveate.cost import fastv, kv_bytes, prefill_flops, probe_flops, pyramiddrop, vision_layers

SEVEN = LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
THIRTEEN = LlamaConfig(num_hidden_layers=40, hidden_size=5120, intermediate_size=13824, num_attention_heads=40)


@pytest.mark.parametrize(
    ("formula", "config", "tokens", "tera"),
    [
        (pyramiddrop, SEVEN, 576, 3.817), (pyramiddrop, SEVEN, 2880, 20.825), (pyramiddrop, SEVEN, 192, 1.253),
        (pyramiddrop, SEVEN, 128, 0.833), (pyramiddrop, SEVEN, 64, 0.416), (pyramiddrop, THIRTEEN, 576, 7.444),
        (fastv, SEVEN, 576, 2.986), (fastv, SEVEN, 2880, 16.670),
    ],
)  # fmt: skip
def test_papers_formulas(formula, config, tokens, tera) -> None:
    assert round(formula(config, tokens) / 1e12, 3) == pytest.approx(tera, abs=1e-9)


def test_papers_formulas_layer_by_layer() -> None:
    pruned = fastv(SEVEN, [576] * 2 + [288] * 30)
    assert 1 - pruned / fastv(SEVEN, 576) == pytest.approx(0.476, abs=5e-4)
    assert 1 - pyramiddrop(SEVEN, [576] * 2 + [288] * 30) / pyramiddrop(SEVEN, 576) == pytest.approx(0.474, abs=5e-4)
    with pytest.raises(foveate.FoveateError, match="32 layers"):
        fastv(SEVEN, [1, 2])


@pytest.mark.parametrize(
    ("tokens", "seven", "thirteen", "kv_seven", "kv_thirteen"),
    [
        (2880, 41.65, 79.88, 1440, 2250), (640, 8.50, 16.58, 320, 500), (576, 7.63, 14.89, 288, 450),
        (320, 4.20, 8.20, 160, 250), (192, 2.51, 4.90, 96, 150), (160, 2.09, 4.08, 80, 125), (128, 1.67, 3.26, 64, 100),
        (64, 0.83, 1.63, 32, 50), (32, 0.42, 0.81, 16, 25), (16, 0.21, 0.41, 8, 12.5),
    ],
)  # fmt: skip
def test_table_of_visual_tokens(tokens, seven, thirteen, kv_seven, kv_thirteen) -> None:
    for config, flops, mebibytes in ((SEVEN, seven, kv_seven), (THIRTEEN, thirteen, kv_thirteen)):
        assert 2 * pyramiddrop(config, tokens) / 1e12 == pytest.approx(flops, abs=0.0051)
        assert kv_bytes(config, tokens) == mebibytes * 2**20
        whole = LlavaConfig(text_config=config)
        assert prefill_flops(whole, tokens, 0, tokens).prefill == 2 * pyramiddrop(config, tokens)


def test_grouped_queries_shrink_the_cache() -> None:
    qwen = LlamaConfig(num_hidden_layers=28, hidden_size=3584, num_attention_heads=28, num_key_value_heads=4)
    assert kv_bytes(qwen, 1) == 57344


def _tiny(**extra: object) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4, image_size=84, patch_size=7
    )
    text = LlamaConfig(
        vocab_size=200, hidden_size=96, intermediate_size=224, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=24,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, **extra)
    config._attn_implementation = "eager"  # the counter does not see the fused kernels of the CPU
    return LlavaForConditionalGeneration(config).eval()


def _inputs() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1] + [4] * 144 + list(range(10, 30))])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 84, 84)}


def _counted(model, inputs) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs, logits_to_keep=1)
    return counter.get_total_flops()


@pytest.mark.parametrize("layers", [-2, [-3, -1]])
def test_agrees_with_the_counter_of_torch(layers) -> None:
    model, inputs = _tiny(vision_feature_layer=layers), _inputs()
    cost = prefill_flops(model.config, 144, 21, 144, early_exit=False)
    assert cost.total == pytest.approx(_counted(model, inputs), rel=0.01)


@pytest.mark.parametrize(
    "reducer",
    [
        VisPruner(keep=24, important_ratio=1.0),
        foveate.load_reducer("pool", keep=24),
        foveate.load_reducer("visionzip", keep=24, contextual_ratio=0.0),
        foveate.load_reducer("prumerge", keep=24, neighbours=1),
        foveate.load_reducer("vflowopt", keep=24),
        foveate.load_reducer("vflowopt", keep=24, t=2.0),
    ],
    ids=repr,
)
def test_agrees_with_the_counter_of_torch_when_pruned(reducer) -> None:
    model, inputs = _tiny(), _inputs()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        reduced = foveate.reduce(model, inputs, reducer)
    probes = probe_flops(model.config, reducer.probes(), [144])
    projected = 144 if reducer.merges == "embeddings" else None
    cost = prefill_flops(model.config, 144, 21, 24, selection=probes, projected=projected)
    assert cost.vision + cost.projector + cost.selection == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert cost.prefill + cost.lm_head == pytest.approx(_counted(model, reduced), rel=0.01)


@pytest.mark.parametrize("name", ["tome", "flowcut"])
def test_agrees_with_the_counter_of_torch_inside_the_encoder(name) -> None:
    reducer, model, inputs = foveate.load_reducer(name, keep=24), _tiny(), _inputs()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        foveate.reduce(model, inputs, reducer)
    rows = [reducer.lengths(144, 24, 3)]
    cost = prefill_flops(model.config, 144, 21, 24, rows=rows)
    # What the methods read and compare is left out.
    assert cost.vision + cost.projector == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert cost.vision < 0.8 * prefill_flops(model.config, 144, 21, 24).vision


def test_causal_attention_is_about_half_of_the_square() -> None:
    config = LlavaConfig()
    square, causal = (prefill_flops(config, 576, 24, 576, causal=c).prefill for c in (False, True))
    text = config.text_config
    assert square - causal == 4 * text.num_hidden_layers * text.hidden_size * (600 * 599 // 2)


def test_tower_stops_after_the_last_layer_in_use() -> None:
    config = LlavaConfig()
    assert config.vision_feature_layer == -2
    assert vision_layers(config) == config.vision_config.num_hidden_layers - 1
    assert vision_layers(config, early_exit=False) == config.vision_config.num_hidden_layers


def test_refuses_what_it_does_not_know() -> None:
    with pytest.raises(foveate.FoveateError, match="between 1 and all"):
        prefill_flops(LlavaConfig(), 576, 10, 577)
    config = LlavaConfig()
    config.text_config.model_type = "mixtral"
    with pytest.raises(foveate.FoveateError, match="'mixtral' are not known"):
        prefill_flops(config, 576, 10, 64)
