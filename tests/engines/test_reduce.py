"""What reduce accepts and refuses, and where gradients flow."""

import pytest
import torch
from transformers import LlamaForCausalLM

import foveate
from foveate import Budget
from foveate.core.errors import UnsupportedModelError
from foveate.families import all_families, family_of
from foveate.methods import Downsample, Random, Uniform, VisPruner
from tiny import FAMILIES, IMAGE, collate, model, sample, samples


def test_gradients_reach_projector_and_tower():
    net, inputs = model("llava"), collate(samples("llava"), labels=True)
    kept = []
    for make_inputs in (lambda: foveate.reduce(net, inputs, VisPruner(keep=9)), None):
        net.zero_grad()
        if make_inputs is not None:
            net(**make_inputs()).loss.backward()
        else:
            with foveate.attach(net, VisPruner(keep=9)):
                net(**inputs).loss.backward()
        wanted = [
            net.model.multi_modal_projector.linear_1.weight,
            net.model.vision_tower.encoder.layers[0].mlp.fc1.weight,
        ]
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in wanted)
        kept.append([p.grad.clone() for p in wanted])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_only_kept_tokens_get_gradients():
    net, inputs = model("llava"), collate([sample(3, "image", 5)], labels=True)
    seen = {}
    hook = net.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.update(rows=len(args[0])))
    net(**foveate.reduce(net, inputs, Uniform(keep=9))).loss.backward()
    hook.remove()
    assert seen["rows"] == 9  # dropped tokens are not even projected


def test_by_name_by_file_and_by_reducer(tmp_path):
    net, inputs = model("llava"), collate(samples("llava"))
    VisPruner(keep=9, step=4).save(tmp_path / "reducer.json")
    expected = foveate.reduce(net, inputs, VisPruner(keep=9, step=4))
    for method, config in [("vispruner", {"keep": 9, "step": 4}), (tmp_path / "reducer.json", {}),
                           (VisPruner(keep=9), {"step": 4})]:  # fmt: skip
        got = foveate.reduce(net, inputs, method, **config)
        assert torch.equal(got["input_ids"], expected["input_ids"])
        assert [s.kept.tolist() for s in got.selection] == [s.kept.tolist() for s in expected.selection]
        with foveate.attach(net, method, **config) as handle:
            assert handle.reducer == VisPruner(keep=9, step=4)


def test_other_models_are_refused():
    net = LlamaForCausalLM(model("llava").config.text_config)
    with pytest.raises(UnsupportedModelError, match=r"'llama'.*there are: llava"):
        foveate.attach(net, "random", keep=9)
    with pytest.raises(UnsupportedModelError, match="LlavaModel has no language-model head"):
        foveate.attach(model("llava").model, "random", keep=9)
    with pytest.raises(UnsupportedModelError, match="there are: llava"):
        foveate.reduce(torch.nn.Linear(1, 1), {}, "random", keep=9)


def test_a_method_of_another_stage_is_refused():
    class Inner(Random):
        stage, name = "projector", "inner"

    with pytest.raises(UnsupportedModelError, match="'projector'"):
        foveate.attach(model("llava"), Inner(keep=9))


def test_default_positions_are_those_of_the_paper():
    net, inputs = model("llava"), collate(samples("llava"))

    class Fixed(Uniform):
        positions = "original"

    assert "position_ids" not in foveate.reduce(net, inputs, Uniform(keep=9))
    assert "position_ids" in foveate.reduce(net, inputs, Fixed(keep=9))
    assert "position_ids" not in foveate.reduce(net, inputs, Fixed(keep=9), positions="compact")


@pytest.mark.parametrize("layer", [-1, -2, -3, [-3, -1]], ids=str)
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_feature_layer_and_strategy_of_the_call(layer, strategy):
    """Chosen by configuration or by the call, with the ``[CLS]`` token in the span or not."""
    net = model("llava")
    if isinstance(layer, list):
        wide = torch.nn.Linear(64, 32)
        net.model.multi_modal_projector.linear_1 = wide
    inputs = collate([sample(3, "image", 5)])
    if strategy == "full":
        row = sample(3, "image", 5)
        row["ids"].insert(3, IMAGE)
        inputs = collate([row])
    options = {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy}
    reduced = foveate.reduce(net, {**inputs, **options}, VisPruner(keep=9), separators="keep")
    (chosen,) = reduced.selection
    assert len(chosen) == 9 + (strategy == "full")
    (features,) = net.get_image_features(inputs["pixel_values"], **options).pooler_output
    (embeds,) = reduced["mm_encoder_outputs"]["image"].pooler_output
    torch.testing.assert_close(embeds, features[chosen.kept], atol=1e-5, rtol=1e-5)
    assert net(**reduced).logits.shape[1] == inputs["input_ids"].shape[1] - chosen.length + len(chosen)


@pytest.mark.parametrize("family", [f for f in FAMILIES if all_families()[f].resizes])
def test_downsample_runs_everywhere(family):
    net, inputs = model(family), collate(samples(family))
    for keep in (9, Budget(0.25, per="crop")):
        reduced = foveate.reduce(net, inputs, Downsample(keep=keep))
        spans = family_of(net).spans(net, inputs)
        for span, chosen in zip(spans, reduced.selection, strict=True):
            assert 0 < len(chosen) <= sum(span.budget(keep))
        assert net(**reduced).logits.isfinite().all()
