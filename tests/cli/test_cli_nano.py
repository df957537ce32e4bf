from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from foveate import nano
from foveate.measure.loading import model_inputs, open_image, prompt_for
from training.nano.export import build_processor

needs_weights = pytest.mark.skipif(not (nano.WEIGHTS / "config.json").is_file(), reason="nano is not trained yet")


def test_questions_reach_nano_as_in_training() -> None:
    processor, image = build_processor(), nano.scene("validation", 0, 0).image
    text = "what color is the star?"
    wanted = processor(images=image, text=f"<image> {text}", return_tensors="pt")["input_ids"]
    assert model_inputs(processor, image, prompt_for(processor, text))["input_ids"].equal(wanted)
    with_bos = prompt_for(processor, text, f"{processor.tokenizer.bos_token}<image>{{question}}")
    assert model_inputs(processor, image, with_bos)["input_ids"].equal(wanted)


@pytest.mark.parametrize("passed", [True, False])
def test_eval_shows_gates_and_fails_with_them(
    foveate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: bool
) -> None:
    from training.nano import acceptance

    score = {"all": {"accuracy": 91.25, "error": 0.5, "questions": 8}}
    gate = {"value": 91.25, "limit": 90.0, "rule": "at least", "passed": passed}
    result = {"accuracy": {"full": score}, "gates": {"whole": gate}}
    monkeypatch.setattr(acceptance, "measure", lambda *_: result)
    (tmp_path / "config.json").write_text("{}")
    shown = foveate("nano", "eval", "--model", tmp_path, "--out", "scores/nano.json")
    assert shown.code == 1 - passed
    assert "91.2" in shown.out
    assert ("passed" if passed else "MISSED") + "  whole" in shown.out
    assert json.loads(Path("scores/nano.json").read_text()) == result
    assert foveate("nano", "eval", "--model", tmp_path, "--split", "x").code == 2


@needs_weights
def test_nano_is_the_default_model(foveate: Any) -> None:
    shown = nano.scene("test", 0, 0)
    shown.image.save("scene.png")
    question = shown.questions[0]
    data = foveate("run", "scene.png", question.text, "--keep", 32, "--compare", "--json").json
    assert (data["tokens"]["before"], data["tokens"]["after"]) == (256, 32)
    assert data["answer_unpruned"] in {q.answer for q in shown.questions} | {"yes", "no"}
    assert data["flops"]["after"] < data["flops"]["before"]
    parts = data["flops_by_part"]
    assert parts["after"]["prefill"] < parts["before"]["prefill"] / 4
    assert data["kv_bytes"]["after"] < data["kv_bytes"]["before"] / 4
    assert len(data["compare"]) == 6
    assert Path(data["overlay"]) == Path("runs/scene-vispruner/overlay.png")
    assert open_image(data["overlay"]).width > 1000


@needs_weights
def test_nano_takes_dtype_and_attention(foveate: Any) -> None:
    nano.scene("test", 0, 1).image.save("scene.png")
    options = ("--dtype", "bfloat16", "--attn", "eager", "--repeats", 1)
    half = foveate("run", "scene.png", "what is there?", "--json", *options).json
    whole = foveate("run", "scene.png", "what is there?", "--json", "--repeats", 1).json
    assert 2 * half["kv_bytes"]["before"] == whole["kv_bytes"]["before"]


@needs_weights
@pytest.mark.slow
def test_nano_eval(foveate: Any) -> None:
    result = foveate("nano", "eval", "--images", 2, "--processes", 1, "--out", "scores/nano.json", "--json")
    assert result.code in (0, 1)
    assert Path("scores/nano.json").is_file()


@needs_weights
@pytest.mark.slow
def test_guides_and_exits(foveate: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    names = ("inside-about", "sgl", "early-exit", "exits")
    page.write_text("".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in names))
    options = ("--images", 1, "--training-images", 2, "--out", "inside.json", "--page", page)
    result = foveate("nano", "inside", *options, "--json").json
    assert json.loads(Path("inside.json").read_text()) == result
    shown = page.read_text()
    assert f"{result['questions']} questions about 1 test scenes" in shown
    assert "| sgl, nano guides itself |" in shown
    assert sum(result["exits"]["dyvte"]["layers_with_image"].values()) == result["questions"]
    assert foveate("nano", "inside", "--page", tmp_path / "none.md").code == 2
