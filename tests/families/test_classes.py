"""The image-text classes of transformers: each has a family, or is refused by its class and configuration."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import foveate
from foveate.core.errors import InputError, UnsupportedModelError
from foveate.engines.transformers.caches import NAME as CACHE
from foveate.engines.transformers.caches import cache_of
from foveate.families import all_families, family_of_class
from foveate.families.classes import REFUSED
from foveate.methods import DivPrune, FastV, Random
from hiding import answers, expected, visible_columns
from record_classes import NOISE, family_name
from tiny_classes import AUDIO, NAMES, batch, build, class_of

RECORD = json.loads((Path(__file__).parents[2] / "results" / "compatibility-classes.json").read_text())
RELATIVES = {
    "glm_ocr": "glm4v",
    "glmga": "glm4v",
    "shieldgemma2": "gemma3",
    "cosmos3_edge": "qwen2_vl",
    "cosmos3_omni": "qwen3_vl",
    "cohere_compass": "qwen3_vl",
    "qwen2_5_omni_thinker": "qwen2_5_omni",
    "qwen3_omni_moe_thinker": "qwen3_omni",
    "ernie4_5_vl_moe": "ernie4_5_vl",
}
ROTARY = ("hunyuan_vl", "hy_v4_vl", "minicpmv4_7", "qwen4_exp")
OTHERS = (
    "deepseek_vl", "deepseek_vl_hybrid", "idefics2", "minicpmv4_6", "minicpm_ocr", "nemotron_h_omni", "janus", "emu3",
    "chameleon", "apertus1p5", "aria", "inkling2", "inkling2_loop", "glm5_next", "dots3_note", "lfm3_vl", "got_ocr2",
    "step3p7", "unlimited_ocr", "muse_spark", "gemma4_unified", "deepseek_ocr2",
)  # fmt: skip
OLDER = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24)
CHANGED_IN_5_24 = {"hunyuan_vl", "minicpmv4_6", "minicpmv4_7"}
"""Whose encoder joined all images, or whose text configuration had no default."""
AT_ONCE = {"deepseek_vl", "idefics2", "minicpmv4_6", "janus"}


def known(kinds):
    """Return those of some model types that the installed transformers has; most of the rest are slow tests."""
    return [
        pytest.param(k, marks=[] if k not in OTHERS or k in AT_ONCE else pytest.mark.slow)
        for k in kinds
        if k in NAMES and not (OLDER and k in CHANGED_IN_5_24)
    ]


@pytest.mark.parametrize("kind", sorted(NAMES))
def test_each_class_has_a_family_or_is_refused_by_name(kind):
    """By class and configuration alone, so that it is known before a model is loaded."""
    family = reason = None
    try:
        family = family_name(kind)
    except UnsupportedModelError as error:
        reason = str(error)
    if family is None:
        assert f"{class_of(kind).__name__} (model type" in reason
        assert reason.partition(", and this one ")[2]
    if RECORD["transformers"] == transformers.__version__:
        row = RECORD["classes"][kind]
        assert row.get("family") == family
        assert ("refused" in row) == (family is None)


def test_what_runs_is_right():
    """No measured prefill is off, and every class is there."""
    assert len(RECORD["classes"]) >= 100
    for kind, row in RECORD["classes"].items():
        found = [row[m] for m in ("divprune", "vispruner") if m in row]
        assert all(isinstance(x, str) or x < NOISE for x in found), kind
        assert ("refused" in row) != ("family" in row)
        if "family" in row and "not built" not in row:
            assert isinstance(row["divprune"], float), kind
    for kind, family in RELATIVES.items():
        assert RECORD["classes"][kind]["family"] == family
        assert isinstance(RECORD["classes"][kind]["vispruner"], float)


@pytest.mark.parametrize("kind", known([*RELATIVES, *ROTARY, *OTHERS]))
@torch.no_grad()
def test_generation_equals_the_stock_model_without_the_dropped_tokens(kind):
    net = build(kind)
    inputs = batch(net)
    family = foveate.families.family_of(net)
    assert family.name == RELATIVES.get(kind, "generic")
    assert family.keeps_positions == (kind in ROTARY or (kind in RELATIVES and kind != "shieldgemma2"))
    steps = 1 if kind == "nemotron_h_omni" else 4  # whose decoding differs from a full pass by 5e-3 without foveate
    # Chameleon embeds tokens inside its decoder, where the oracle of compact positions does not see them.
    for positions in ["original"] if family.keeps_positions or kind == "chameleon" else ["original", "compact"]:
        reduced = foveate.reduce(net, inputs, DivPrune(keep=0.5), positions=positions)
        visible = visible_columns(inputs, reduced)
        plain = net(**inputs).logits[:, -1]
        if positions == "original":
            due = expected(net, inputs, reduced)
            torch.testing.assert_close(net(**reduced).logits[:, -1], due, atol=NOISE, rtol=NOISE)
            assert (plain - due).abs().max() > 1e-2
        with foveate.attach(net, DivPrune(keep=0.5), positions=positions):
            out = net.generate(
                **inputs, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
        due = answers(net, inputs, out.sequences[:, inputs["input_ids"].shape[1] :], visible, positions)
        torch.testing.assert_close(torch.stack(out.logits, 1), due, atol=NOISE, rtol=NOISE)


@pytest.mark.parametrize("kind", known(["qwen2_5_omni_thinker", "ernie4_5_vl_moe", "hunyuan_vl", "minicpmv4_7"]))
@torch.no_grad()
def test_a_second_turn_goes_on_from_the_positions_of_the_full_prompt(kind):
    net = build(kind)
    inputs = batch(net)
    visible = visible_columns(inputs, foveate.reduce(net, inputs, DivPrune(keep=0.5)))
    new = torch.tensor([[21, 22, 23], [24, 25, 26]])
    with foveate.attach(net, DivPrune(keep=0.5)):
        first = net(**inputs, use_cache=True)
        cache = {CACHE: cache_of(first)}
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1)
        logits = net(input_ids=new, attention_mask=mask, **cache).logits
    due = answers(net, inputs, torch.cat([new, new[:, :1]], dim=1), visible, "original")[:, 1:]
    torch.testing.assert_close(logits, due, atol=NOISE, rtol=NOISE)


@torch.no_grad()
def test_images_that_an_encoder_joins_have_budgets_of_their_own():
    net = build("idefics2")
    inputs = batch(net)
    two = {k: torch.cat([x[:1], x[:1]], dim=1) for k, x in inputs.items()}
    two["pixel_values"] = inputs["pixel_values"].transpose(0, 1)
    reduced = foveate.reduce(net, two, Random(keep=2), positions="original")
    assert [[len(s) for s in row] for row in reduced.selection.by_prompt(1)] == [[2, 2]]
    torch.testing.assert_close(net(**reduced).logits[:, -1], expected(net, two, reduced), atol=NOISE, rtol=NOISE)


@pytest.mark.parametrize("kind", known(["qwen2_5_omni_thinker", "qwen3_omni_moe_thinker"]))
@pytest.mark.skipif(OLDER, reason="sounds made other numbers of tokens")
@torch.no_grad()
def test_sounds_beside_images(kind):
    """Their tokens keep their places and positions."""
    net = build(kind)
    inputs = batch(net)
    heard = torch.tensor([113, *[AUDIO] * 2, 114, 7]).repeat(2, 1)
    for key, further in [("input_ids", heard), ("attention_mask", torch.ones_like(heard))]:
        inputs[key] = torch.cat([inputs[key], further], dim=1)
    frames = torch.ones(2, 8, dtype=torch.long)
    inputs |= {"input_features": torch.randn(2, 16, 8), "feature_attention_mask": frames}
    net.model.get_audio_features = lambda *args, **kwargs: SimpleNamespace(
        last_hidden_state=torch.linspace(-1, 1, 4 * 32).reshape(4, 32)
    )
    reduced = foveate.reduce(net, inputs, DivPrune(keep=0.5))
    assert torch.equal(reduced["feature_attention_mask"], frames)
    torch.testing.assert_close(net(**reduced).logits[:, -1], expected(net, inputs, reduced), atol=NOISE, rtol=NOISE)
    with pytest.raises(InputError, match="sounds between the frames"):
        foveate.reduce(net, {**inputs, "use_audio_in_video": True}, DivPrune(keep=0.5))


@pytest.mark.parametrize("kind", known(["exaone4_5", "hyperclovax_vision_v2"]))
@torch.no_grad()
def test_models_whose_generate_throws_positions_away(kind):
    net = build(kind)
    inputs = batch(net)
    greedy = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    refused = pytest.raises(UnsupportedModelError, match="throws position_ids away: use positions='compact'")
    with foveate.attach(net, DivPrune(keep=0.5), positions="original"), refused:
        net.generate(**inputs, **greedy)
    visible = visible_columns(inputs, foveate.reduce(net, inputs, DivPrune(keep=0.5)))
    with foveate.attach(net, DivPrune(keep=0.5), positions="compact"):
        out = net.generate(**inputs, **greedy)
    due = answers(net, inputs, out.sequences[:, inputs["input_ids"].shape[1] :], visible, "compact")
    torch.testing.assert_close(torch.stack(out.logits, 1), due, atol=NOISE, rtol=NOISE)


@torch.no_grad()
def test_gemma3n_runs_several_streams_at_once(monkeypatch):
    """Methods before the LLM run; those inside it, which read what its layers are given, are refused."""
    from transformers.models.gemma3n import modeling_gemma3n as gemma3n

    original = gemma3n.AutoModel.from_config

    def without_timm(config, **kwargs):
        is_vision = config.model_type == "gemma3n_vision"
        return torch.nn.Module() if is_vision else original(config, **kwargs)

    monkeypatch.setattr(gemma3n.AutoModel, "from_config", without_timm)
    net = build("gemma3n")
    net.model.vision_tower.forward = lambda pixel_values, **_: BaseModelOutputWithPooling(
        last_hidden_state=pixel_values.flatten(1)[:, :512].reshape(-1, 32, 4, 4)
    )
    inputs = batch(net)
    reduced = foveate.reduce(net, inputs, DivPrune(keep=0.5), positions="original")
    torch.testing.assert_close(net(**reduced).logits[:, -1], expected(net, inputs, reduced), atol=NOISE, rtol=NOISE)
    with (
        pytest.raises(UnsupportedModelError, match="of which tokens cannot be taken out"),
        foveate.attach(net, FastV(layer=1, keep=0.5)),
    ):
        net(**inputs)


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if kind in NAMES])
def test_classes_that_are_refused_by_name(kind):
    with pytest.raises(UnsupportedModelError, match=f"'{kind}'.* and this one {REFUSED[kind][:20]}"):
        family_of_class(class_of(kind), CONFIG_MAPPING[kind]())
    assert kind in all_families()["generic"].refuses


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("blip-2", "lacks a generate that takes images that are encoded"),
        ("instructblip", "lacks a generate that takes images that are encoded"),
        ("janus", None),
        ("minicpmv4_6", "lacks image_token_id in its configuration"),
        ("mllama", "lacks a method get_image_features"),
        ("florence2", "lacks mm_encoder_outputs among the arguments of forward"),
    ],
)
def test_what_a_class_lacks(kind, reason):
    if kind not in NAMES:
        pytest.skip("not in this version of transformers")
    if reason is None:
        assert family_of_class(class_of(kind), CONFIG_MAPPING[kind]()).name == "generic"
        return
    with pytest.raises(UnsupportedModelError, match=f"and this one {reason}"):
        family_of_class(class_of(kind), CONFIG_MAPPING[kind]())


@pytest.mark.skipif("qwen4_exp" not in NAMES, reason="not in this version of transformers")
def test_n_grams_of_the_prompt():
    config = CONFIG_MAPPING["qwen4_exp"]()
    assert family_of_class(class_of("qwen4_exp"), config).name == "generic"
    config.text_config.ple_layer_ids = [1]
    with pytest.raises(UnsupportedModelError, match="embeds n-grams of its prompts"):
        family_of_class(class_of("qwen4_exp"), config)
