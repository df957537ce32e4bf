from __future__ import annotations

import re
from itertools import groupby

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import foveate
import tiny
from foveate import VisPruner
from foveate.core.probes import Attention
from foveate.cost import (
    anatomy_of,
    decode_flops,
    equivalent_tokens,
    fastv,
    kv_bytes,
    prefill_flops,
    probe_flops,
    pyramiddrop,
    vision_layers,
    work_of,
)
from foveate.cost.figures import figures, report
from foveate.cost.imagined import imagine
from foveate.cost.shapes import SHAPES, load_shape
from foveate.families import family_of
from foveate.methods import FastV

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
    probes = probe_flops(model.config, reducer.needs, [144])
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
    with pytest.raises(foveate.FoveateError, match="no layer gets more"):
        prefill_flops(LlavaConfig(), 576, 10, [64] * 31 + [65])
    with pytest.raises(foveate.FoveateError, match="'llama' does not answer questions about images"):
        prefill_flops(SEVEN, 576, 10, 64)


def _layers(*runs: tuple[int, int]) -> list[int]:
    return [tokens for tokens, layers in runs for _ in range(layers)]


@pytest.mark.parametrize(
    ("counts", "tera", "mean_in", "mean_out"),
    [
        (_layers((576, 32)), 3.817, 576, 576),
        (_layers((576, 2), (288, 30)), 2.007, 306, 297),  # FastV K=2, R=.5
        (_layers((576, 2), (144, 30)), 1.118, 171, 157.5),  # FastV K=2, R=.75
        (_layers((576, 3), (288, 29)), 2.068, 315, 306),  # FastV K=3, R=.5
        (_layers((576, 8), (288, 8), (144, 8), (72, 8)), 1.777, 270, 254.25),  # PyramidDrop
        (_layers((576, 3), (309, 4), (204, 9), (113, 16)), 1.353, 206.5, 192.03),  # SparseVLM v1.5
        (_layers((576, 3), (312, 4), (117, 9), (39, 16)), 0.954, 145.4, 128.6),
        (_layers((576, 3), (249, 4), (55, 9), (27, 16)), 0.749, 114.1, 96.94),
        (_layers((576, 3), (82, 4), (32, 9), (18, 16)), 0.541, 82.25, 64.81),
    ],
)
def test_tables_of_methods_inside_the_llm(counts, tera, mean_in, mean_out) -> None:
    assert round(pyramiddrop(SEVEN, counts) / 1e12, 3) == tera
    assert equivalent_tokens(counts) == pytest.approx(mean_in, abs=0.051)
    assert equivalent_tokens(counts, "output") == pytest.approx(mean_out, abs=0.051)


def test_fastv_counts_the_whole_prompt() -> None:
    vanilla, half, quarter = (
        fastv(SEVEN, _layers((576, 2), (k, 30)), text_tokens=35) / 32e9 for k in (576, 288, 144)
    )  # fmt: skip
    assert 99.2 <= round(vanilla, 1) <= 99.3
    assert half == pytest.approx(54.6, abs=0.05)
    assert quarter == pytest.approx(32.8, abs=0.05)
    assert round(100 * half / vanilla) == 55
    assert round(100 * quarter / vanilla) == 33


def test_vispruners_published_flops() -> None:
    """43.6 T and 3.8 T on LLaVA-NeXT-7B, 2,880 and 160 tokens, are those of the LLM with about 130 tokens of text."""
    config, _ = load_shape("llava-next-7b")
    before, after = (prefill_flops(config, 2880, 130, kept).prefill for kept in (2880, 160))
    assert before == pytest.approx(43.6e12, rel=0.005)
    assert after == pytest.approx(3.8e12, rel=0.005)
    assert round(100 * (after / before - 1)) == -91


def test_methods_inside_the_llm_report_their_schedule() -> None:
    config, _ = load_shape("llava-1.5-7b")
    anatomy = anatomy_of(config)
    work = imagine(anatomy, (336, 336), 1, 0)
    cuts = foveate.Chain(FastV(keep=288, layer=1), FastV(keep=64, layer=16))
    data = report(anatomy, work, cuts, 24)
    counts = [576] + [288] * 15 + [64] * 16
    after = data["after"]
    assert after["visual_tokens_per_layer"] == counts
    assert after["equivalent_tokens"] == {"input": sum(counts) / 32, "output": sum([*counts[1:], 64]) / 32}
    assert after["kv_bytes"] == kv_bytes(config.text_config, [24 + n for n in counts])
    assert after["kv_bytes"] == sum(2 * (24 + n) * 4096 * 2 for n in counts)
    assert after["macs"]["pyramiddrop"] == pyramiddrop(config.text_config, counts)
    assert after["macs"]["fastv"] == fastv(config.text_config, counts, 24)
    groups = [(n, len(list(group))) for n, group in groupby(counts)]
    whole = {n: prefill_flops(config, 576, 24, n).prefill for n, _ in groups}
    assert after["flops"]["prefill"] == sum(layers * whole[n] // 32 for n, layers in groups)
    assert after["flops"]["vision"] == data["before"]["flops"]["vision"]
    assert data["change"]["cost"] == data["change"]["flops"]["total"]
    assert (
        report(anatomy, work, cuts, 24, formula="pyramiddrop")["change"]["cost"]
        == (data["change"]["macs"]["pyramiddrop"])
    )


def test_a_decoded_token_costs_what_a_prefill_of_one_more_adds() -> None:
    config = LlavaConfig()
    longer, shorter = (prefill_flops(config, 576, text, 576, causal=True).prefill for text in (25, 24))
    pairs = 4 * 32 * 4096
    assert decode_flops(config, 600) == longer - shorter + 2 * 4096 * config.text_config.vocab_size
    assert decode_flops(config, 600) - decode_flops(config, 599) == pairs
    assert decode_flops(config, _layers((600, 16), (100, 16))) == decode_flops(config, 600) - pairs // 2 * 500


PARTED = [name for name in tiny.FAMILIES if name not in ("ovis2", "generic", "fast_vlm")]
"""Families whose modules part what belongs to the projector from the rest."""
QUICK = (*tiny.CORE, "internvl", "qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3", "mistral3", "lfm2_vl")
_PROJECTOR = re.compile(r"\.(multi_modal_projector|connector|projector|merger|downsample|deepstack_merger_list\.\d+)$")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in tiny.FAMILIES])
def test_every_family_agrees_with_the_counter_of_torch(name: str) -> None:
    model = tiny.model(name, "eager")
    anatomy = anatomy_of(model.config, type(model))
    for visual in tiny.VISUALS[name]:
        inputs = tiny.collate([tiny.sample(3, visual, 4)])
        spans = family_of(model).spans(model, inputs)
        work = work_of(anatomy, inputs, spans)
        text = inputs["input_ids"].shape[1] - work.tokens
        cost = prefill_flops(
            anatomy, work.tokens, text, work.tokens, rows=work.rows(anatomy), windows=work.windows(anatomy),
            vision=work.encoder_flops, projected=work.projected(anatomy), early_exit=False,
        )  # fmt: skip
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**inputs, logits_to_keep=1)
        real = {module: sum(ops.values()) for module, ops in counter.get_flop_counts().items()}
        language = next(n for module, n in real.items() if module.endswith((".language_model", ".text_model")))
        head = next(n for module, n in real.items() if module.endswith(".lm_head"))
        projector = sum(n for module, n in real.items() if _PROJECTOR.search(module))
        table = tiny.table_flops(name, counter)
        assert cost.lm_head == head
        if name == "qwen3_5":  # steps of the recurrence, which torch's reference does in chunks that cost more
            assert language / 2 < cost.prefill < language
        else:
            assert cost.prefill == pytest.approx(language, rel=0.01)
        assert cost.vision + cost.projector == pytest.approx(real["Global"] - language - head - table, rel=0.01)
        if name in PARTED:
            assert cost.projector == pytest.approx(projector, rel=0.01)


@pytest.mark.parametrize(
    ("name", "size", "tokens"),
    [
        ("llava-1.5-7b", (640, 480), 576),
        ("llava-1.5-13b", (640, 480), 576),
        ("llava-next-7b", (672, 672), 5 * 576 + 48),  # a newline behind each row of the mosaic
        ("video-llava-7b", (640, 480), 256),
        ("llava-onevision-7b", (384, 384), 729 + 27 * 28),
        ("qwen2-vl-7b", (1120, 560), 800),
        ("qwen2.5-vl-7b", (1120, 560), 800),
        ("qwen3-vl-8b", (1024, 512), 512),
        ("internvl3-8b", (896, 896), 5 * 256),
        ("gemma3-4b", (640, 480), 256),
    ],
)
def test_what_an_image_comes_to(name: str, size: tuple[int, int], tokens: int) -> None:
    config, processor = load_shape(name)
    anatomy = anatomy_of(config)
    one, two = (imagine(anatomy, size, images, 0, None, processor) for images in (1, 2))
    assert one.tokens == tokens
    assert two.tokens == (2 * 730 if name == "llava-onevision-7b" else 2 * tokens)
    stock = figures(anatomy, one, 40, None).flops
    # Depth times about twice the parameters of a layer, which the names promise: 7 or 8 thousand million.
    parameters = sum(p.numel() for p in anatomy.model.get_decoder().layers.parameters())
    assert stock["prefill"] > 2 * parameters * (tokens + 40)
    assert stock["decode_per_token"] < 2.3 * (parameters + config.get_text_config().vocab_size * 5120)


def test_every_shape_is_tried() -> None:
    assert set(SHAPES) == {arguments[0] for arguments in test_what_an_image_comes_to.pytestmark[0].args[1]}


@pytest.mark.parametrize(
    ("name", "frames", "tokens", "pictures"),
    [
        ("video-llava-7b", 8, 8 * 257, 8),
        ("llava-onevision-7b", 4, 4 * 196 + 1, 4),
        ("qwen2.5-vl-7b", 5, 3 * 20 * 40, 3),
        ("internvl3-8b", 4, 4 * 256, 4),
    ],
)
def test_what_a_video_comes_to(name: str, frames: int, tokens: int, pictures: int) -> None:
    config, processor = load_shape(name)
    work = imagine(anatomy_of(config), (1120, 560), 0, frames, None, processor)
    assert work.tokens == tokens
    assert len(work.pictures) == pictures


def test_stated_numbers_of_visual_tokens() -> None:
    next_, qwen = (anatomy_of(load_shape(name)[0]) for name in ("llava-next-7b", "qwen2.5-vl-7b"))
    work = imagine(next_, (1, 1), 1, 0, 2880)
    assert [len(crop) for crop in work.spans[0].crops] == [576] * 5
    assert work.pictures == ((24, 24),) * 5
    work = imagine(qwen, (1, 1), 2, 0, 1200)
    assert [crop.grid for span in work.spans for crop in span.crops] == [(24, 25)] * 2
    assert sum(work.rows(qwen)) == 4800
    with pytest.raises(foveate.FoveateError, match="equal parts"):
        imagine(qwen, (1, 1), 2, 0, 1201)
    with pytest.raises(foveate.FoveateError, match="take no videos"):
        imagine(anatomy_of(load_shape("llava-1.5-7b")[0]), (1, 1), 0, 4)
    with pytest.raises(foveate.FoveateError, match="there is no preprocessor_config"):
        imagine(qwen, (100, 100), 1, 0)


@pytest.mark.parametrize("rule", ["fixed", "mass", "converged"])
def test_exits_by_rule_have_a_cost(rule: str) -> None:
    config, _ = load_shape("nano")
    anatomy = anatomy_of(config)
    arm = figures(anatomy, imagine(anatomy, (1, 1), 1, 0), 12, foveate.load_reducer("visual_exit", rule=rule))
    assert arm.flops["prefill"] <= figures(anatomy, imagine(anatomy, (1, 1), 1, 0), 12, None).flops["prefill"]
    assert (arm.flops["selection"] > 0) == (rule == "mass")


@pytest.mark.parametrize("method", ["vispruner", "visionzip", "cdpruner", "pool", "downsample", "tome", "prumerge"])
def test_decisions_on_tokens_that_nobody_has_seen(method: str) -> None:
    config, _ = load_shape("nano")
    anatomy = anatomy_of(config)
    work = imagine(anatomy, (1, 1), 1, 0)
    arm = figures(anatomy, work, 12, foveate.load_reducer(method, keep=0.25))
    assert 0 < arm.per_layer[0] <= work.tokens // 4 + 1
    stock = figures(anatomy, work, 12, None)
    assert arm.flops["prefill"] < stock.flops["prefill"]
    assert arm.flops["vision"] < stock.flops["vision"]
    assert (arm.flops["selection"] > 0) == (method in ("vispruner", "visionzip", "cdpruner", "prumerge"))


def test_chains_and_several_images_inside_the_llm() -> None:
    anatomy = anatomy_of(load_shape("llava-1.5-7b")[0])
    one, two = (imagine(anatomy, (336, 336), images, 0) for images in (1, 2))
    fastv_ = foveate.load_reducer("fastv", keep=64, layer=3)
    assert figures(anatomy, one, 40, fastv_).per_layer == _layers((576, 3), (64, 29))
    assert figures(anatomy, two, 40, fastv_).per_layer == _layers((1152, 3), (128, 29))
    chain = figures(anatomy, two, 40, foveate.Chain(VisPruner(keep=288), fastv_))
    assert chain.per_layer == _layers((576, 3), (128, 29))
    alone = figures(anatomy, two, 40, VisPruner(keep=288))
    for part in ("vision", "projector"):
        assert chain.flops[part] == alone.flops[part]
    # One row of attention over 576 visual and 40 other tokens.
    assert chain.flops["selection"] == alone.flops["selection"] + 2 * (576 + 40) * 4096


def test_probes_by_depth_are_counted_in_layers_without_windows():
    anatomy = anatomy_of(load_shape("qwen2.5-vl-7b")[0])
    rows = [40 * 40]
    named = probe_flops(anatomy, [Attention(of="received", layers=2 / 3)], rows)
    assert named == probe_flops(anatomy, [Attention(of="received", layers=(-9, -1))], rows) > 0  # 23 and 31 of 32
