"""`foveate bench model`: a folder, a shape, its files, and input that it refuses."""

import json

import pytest
from PIL import Image

from foveate.bench import random_models
from tiny_families import TINIES

FAST = ("--repeats", 1, "--max-new-tokens", 2)


def test_a_model_with_weights(foveate, folder, photo, tmp_path):
    given = ("--model", folder, "--keep", 9, "--image", photo, "--question", "what is this ?", *FAST)
    result = foveate("bench", "model", *given, "--out", tmp_path / "r.json", "--plot", tmp_path / "r.png", "--json")
    assert result.code == 0, result.err
    assert result.json == json.loads((tmp_path / "r.json").read_text())
    assert [row["tokens"] for row in result.json["arms"]] == [64, 64, 9, 9, 9]
    assert result.json["command"].startswith(f"foveate bench model --model {folder} --keep 9 --image")
    assert "'what is this ?'" in result.json["command"]
    with Image.open(tmp_path / "r.png") as plot:
        assert plot.size[0] > 1000


def test_a_shape(foveate, monkeypatch):
    monkeypatch.setattr(random_models, "load_shape", lambda _: (TINIES["llava"].build().config, None))
    given = ("--model", "llava-1.5-7b", "--layers", 2, "--method", "fastervlm", "--keep", "0.25", "--no-tied")
    result = foveate("bench", "model", *given, "--text-tokens", 5, "--threads", 1, *FAST, "--json")
    assert result.code == 0, result.err
    config = result.json["config"]
    assert (config["layers"], config["dtype"], config["tied"], config["text_tokens"]) == (2, "bfloat16", False, 5)
    assert "--no-tied" in result.json["command"]
    assert [row["arm"] for row in result.json["arms"]] == ["unpruned", "ratio 1", "method", "oracle"]


def test_the_table(foveate, folder, photo):
    result = foveate("bench", "model", "--model", folder, "--keep", 9, "--image", photo, *FAST)
    assert result.code == 0, result.err
    for words in ("naive", "first token", "prefill saved", "times as fast as the naive way", "dropped tokens on"):
        assert words in result.out
    assert "nan" not in result.out.lower().replace("naive", "")


def test_methods_without_a_selection_of_their_own_are_refused(foveate):
    for name, reason in (("fastv", "stage in_llm"), ("dyvte", "needs gates")):
        result = foveate("bench", "selection", name)
        assert (result.code, result.out) == (2, "")
        assert f"{name} has no selection to time by itself: {reason}" in result.err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--layers", 2), "'nano' is no shape"),
        (("--model", "llava-1.5-7b", "--question", "why?"), "leave out --question"),
        (("--model", "llava-1.5-7b", "--dtype", "int8"), "not 'int8'"),
        (("--model", "llava-9"), "no model 'llava-9'"),
        (("--method", "nothing"), "no method is called"),
    ],
)
def test_refused(foveate, given, said):
    result = foveate("bench", "model", *given)
    assert result.code == 2
    assert said in result.err
    assert not result.out
