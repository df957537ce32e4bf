from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from foveate.core.codebook import Codebook, projector_hash
from foveate.measure.loading import load_model
from foveate.nano import WEIGHTS, scene

needs_weights = pytest.mark.skipif(not (WEIGHTS / "config.json").is_file(), reason="no weights of nano")
# nano is sure of its one-word answers: the limits of LLaVA would let nothing pass. These hold for any weights of it.
LIMITS = ("--confidence", 1, "--divergence", 1.5, "--samples", 12, "--spread", 1, "--clusters", 2)


@needs_weights
def test_from_scenes_to_a_pruned_answer(foveate: Any, tmp_path: Path) -> None:
    result = foveate("codebook", "--scenes", 3, "--out", "books/nano.safetensors", "--json", *LIMITS)
    assert result.code == 0, result.err
    data = result.json
    book = Codebook.load("books/nano.safetensors")
    assert list(book.prototypes.shape) == [data["prototypes"], data["width"]]
    assert data["prototypes"] == data["counts"]["prototypes"] > 0
    assert data["counts"]["images"] == 3
    assert data["counts"]["tested"] == 36 >= data["counts"]["unsure"] >= data["counts"]["without_effect"]
    assert (book.model, data["model"]) == ("nano", "nano")
    net, _ = load_model("nano")
    assert book.projector == projector_hash(net.model.multi_modal_projector)

    scene("validation", 0, 0).image.save("scene.png")
    run = ("run", "scene.png", "what is there?", "--method", "codebook", "--set", "codebook=books/nano.safetensors")
    options = ("--keep", 64, "--repeats", 1, "--json")
    assert foveate(*run, *options).json["tokens"]["after"] == 64
    assert foveate(*run, *options, "--dtype", "bfloat16").json["tokens"]["after"] == 64


def test_from_a_folder_of_images(foveate: Any, folder: Path, photo: Path) -> None:
    common = ("codebook", "--model", folder, "--images", photo.parent, "--out", "x.safetensors")
    result = foveate(*common, "--confidence", 1, "--divergence", 1, "--spread", 0)
    assert result.code == 0, result.err
    assert "prototypes of width 48 in x.safetensors" in result.out
    assert "1 images, 64 tested" in result.out
    assert Codebook.load("x.safetensors").model == folder.name
    wrong = foveate(
        "run", photo, "what ?", "--method", "codebook", "--set", "codebook=x.safetensors", "--model", "nano"
    )
    assert (wrong.code, wrong.out) == (2, "")


def test_mistakes_are_one_line(foveate: Any, folder: Path, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    out = ("--out", "x.safetensors", "--model", folder)
    for arguments, message in (
        (out, "--images FOLDER or --scenes N"),
        ((*out, "--scenes", 2, "--images", "."), "--images FOLDER or --scenes N"),
        ((*out, "--images", "absent"), "no folder at 'absent'"),
        ((*out, "--images", "empty"), "no images in 'empty'"),
        (("--scenes", 2, "--out", "x.bin"), "name it 'x.safetensors'"),
        ((*out, "--images", photo.parent, "--confidence", 0), "no prototypes in 1 images"),
    ):
        result = foveate("codebook", *arguments)
        assert (result.code, result.out) == (2, "")
        assert message in result.err.replace("\n", " ")
    assert not Path("x.safetensors").exists()
    assert json.loads(foveate("methods", "codebook", "--json").out)[0]["parameters"]["codebook"] == {}
