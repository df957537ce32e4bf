from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import foveate as library
from foveate.methods import VFlowOptAll
from foveate.nano import WEIGHTS, scene

needs_optuna = pytest.mark.skipif(find_spec("optuna") is None, reason="foveate[calibrate]")
needs_weights = pytest.mark.skipif(not (WEIGHTS / "config.json").is_file(), reason="no weights of nano")
FEW = ("--calls", 3, "--initial", 2)


@needs_optuna
@needs_weights
def test_from_scenes_to_a_pruned_answer(foveate: Any) -> None:
    result = foveate("calibrate", "--scenes", 2, "--keep", 0.25, "--out", "made/x.json", "--json", *FEW)
    assert result.code == 0, result.err
    data = result.json
    method = library.load_reducer("made/x.json")
    assert isinstance(method, VFlowOptAll)
    assert method.to_dict() == data["reducer"]
    assert data["cosine"] == max(data["cosines"])
    assert len(data["cosines"]) == data["calls"] == 3
    assert data["prompts"] == 2
    assert data["versions"]["transformers"]
    scene("validation", 0, 0).image.save("scene.png")
    run = foveate("run", "scene.png", "what is there?", "--method", "made/x.json", "--repeats", 1, "--json")
    assert run.code == 0, run.err
    assert 0 < run.json["tokens"]["after"] < run.json["tokens"]["before"]


@needs_optuna
@needs_weights
def test_from_prompts_of_ones_own(foveate: Any, photo: Path, tmp_path: Path) -> None:
    rows = [{"image": photo.name, "question": "what is it?"}, {"image": str(photo), "question": "what color is it?"}]
    file = photo.parent / "prompts.json"
    file.write_text(json.dumps(rows))
    result = foveate("calibrate", "--prompts", file, "--out", "x.json", *FEW)
    assert result.code == 0, result.err
    assert "VFlowOptAll(keep=None, ratios=(" in result.out
    assert "cosine to the unpruned model" in result.out


def test_mistakes_are_one_line(foveate: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "half.json").write_text('[{"image": "a.png"}]')
    (tmp_path / "absent-image.json").write_text('[{"image": "a.png", "question": "what?"}]')
    for arguments, message in (
        ((), "either --prompts FILE or --scenes N"),
        (("--scenes", 2, "--prompts", "x.json"), "either --prompts FILE or --scenes N"),
        (("--prompts", "absent.json"), "cannot read the prompts in 'absent.json'"),
        (("--prompts", "bad.json"), "is no JSON"),
        (("--prompts", "none.json"), "must hold a list of prompts"),
        (("--prompts", "half.json"), 'needs an "image" and a "question"'),
        (("--prompts", "absent-image.json"), "no image file at 'a.png'"),
        (("--scenes", 1, "--model", "absent"), "no model 'absent'"),
        (("--scenes", 1, "--keep", 1.5), "below 1.0, not 1.5"),
    ):
        result = foveate("calibrate", "--out", "x.json", *arguments)
        assert (result.code, result.out) == (2, "")
        assert message in result.err
        assert len(result.err.strip().splitlines()[-1]) > len(message)
    result = foveate("calibrate", "--scenes", 1, "--out", "x.txt")
    assert (result.code, result.out) == (2, "")
    assert "name it 'x.json'" in result.err


@needs_weights
def test_gaze_stops_at_a_mean(foveate: Any) -> None:
    result = foveate("calibrate", "--method", "gaze", "--tokens", 8, "--scenes", 3, "--out", "g.json", "--json")
    assert result.code == 0, result.err
    assert result.json["reducer"]["method"] == "gaze"
    assert result.json["mean"] <= 8
    assert len(result.json["counts"]) == result.json["prompts"] == 3
    assert library.load_reducer("g.json").to_dict() == result.json["reducer"]
    result = foveate("calibrate", "--method", "gaze", "--calls", 3, "--scenes", 1, "--out", "x.json")
    assert result.code == 2
    assert "--calls" in result.err
