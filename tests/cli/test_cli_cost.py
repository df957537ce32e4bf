from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from foveate import Chain
from foveate.cost import fastv, kv_bytes, pyramiddrop
from foveate.methods import PruMerge, ToDREExit
from foveate.nano import WEIGHTS


def test_one_document_with_all_figures(foveate: Any, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "cost.json"
    data = foveate(
        "cost", "--model", "nano", "--keep", "64", "--text-tokens", "12", "--formula", "fastv", "--out",
        str(out), "--json",
    ).json  # fmt: skip
    assert json.loads(out.read_text()) == data
    text = AutoConfig.from_pretrained(WEIGHTS).get_text_config()
    before, after = data["before"], data["after"]
    assert (before["visual_tokens"], after["visual_tokens"]) == (256, 64)
    assert after["equivalent_tokens"] == {"input": 64, "output": 64}
    assert after["kv_bytes"] == kv_bytes(text, 76)
    assert after["macs"] == {"fastv": fastv(text, 64, 12), "pyramiddrop": pyramiddrop(text, 64)}
    assert data["change"]["cost"] == after["macs"]["fastv"] / before["macs"]["fastv"] - 1
    parts = ("vision", "projector", "selection", "prefill", "lm_head")
    for arm in (before, after):
        assert arm["flops"]["total"] == sum(arm["flops"][part] for part in parts)
    assert after["flops"]["selection"] > 0
    assert data["versions"]["transformers"]


def test_table(foveate: Any) -> None:
    shown = foveate("cost", "--model", "nano", "--keep", "64").out
    for word in ("VisPruner", "vision, FLOPs", "decode, per token", "KV cache (bfloat16)", "256", "64"):
        assert word in shown
    assert "multiply-accumulates (pyramiddrop)" in foveate("cost", "--model", "nano", "--formula", "pyramiddrop").out


def test_a_folder_with_a_configuration_alone(foveate: Any, tmp_path: Path) -> None:
    AutoConfig.from_pretrained(WEIGHTS).save_pretrained(tmp_path)
    named, folder = (foveate("cost", "--model", m, "--images", "2", "--json").json for m in ("nano", str(tmp_path)))
    assert folder["before"]["visual_tokens"] == 512
    assert {**named, "model": ""} == {**folder, "model": ""}


def test_keeping_all_costs_what_the_stock_model_does(foveate: Any) -> None:
    data = foveate("cost", "--model", "nano", "--keep", "1.0", "--json").json
    assert data["before"] == data["after"]
    assert data["change"]["cost"] == 0


@pytest.mark.parametrize(
    ("method", "names", "tokens"),
    [
        (("todre_exit",), "todre_exit decides while it runs", 256),
        (("todre_all", "--keep", "64"), "todre_exit decides while it runs", 64),
        (("visual_exit", "--set", "rule=mass"), "visual_exit decides while it runs", 256),
        (("text_interaction", "--set", "keep=null", "--set", "most=0.5"), "text_interaction_image decides", 128),
        (("prumerge", "--keep", "64", "--set", "adaptive=true"), "prumerge decides while it runs", 64),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else None,
)
def test_adaptive_methods_cost_at_most_this(foveate: Any, method: tuple[str, ...], names: str, tokens: int) -> None:
    arguments = ("cost", "--model", "nano", "--method", *method)
    assert f"at most: {names}" in " ".join(foveate(*arguments).out.split())
    data = foveate(*arguments, "--json").json
    assert data["upper_bound"] is True
    assert data["after"]["visual_tokens"] == tokens


def test_a_chain_names_all_methods_that_decide(foveate: Any, tmp_path: Path) -> None:
    config = tmp_path / "chain.json"
    Chain(PruMerge(keep=64, adaptive=True), ToDREExit()).save(config)
    shown = foveate("cost", "--model", "nano", "--method", str(config)).out
    assert "at most: prumerge and todre_exit decide while they run" in shown


@pytest.mark.parametrize("method", [("vispruner",), ("visual_exit",), ("fastv", "--keep", "9")], ids=lambda x: x[0])
def test_other_methods_cost_exactly_this(foveate: Any, method: tuple[str, ...]) -> None:
    arguments = ("cost", "--model", "nano", "--method", *method)
    assert "at most" not in foveate(*arguments).out
    assert foveate(*arguments, "--json").json["upper_bound"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "no-such-shape"), "built-in shapes are nano, llava-1.5-7b"),
        (("--model", "nano", "--image-size", "large"), "WIDTHxHEIGHT"),
        (("--model", "nano", "--visual-tokens", "256", "--image-size", "10x10"), "leave out --image-size"),
        (("--model", "qwen2.5-vl-7b", "--image-size", "10000x10"), "does not take pictures of 10000 x 10 pixels"),
        (("--model", "qwen2.5-vl-7b", "--image-size", "9999999999x1"), "does not take pictures of 9999999999 x 1"),
        (("--model", "nano", "--formula", "sum"), "true, fastv, pyramiddrop"),
        (("--model", "nano", "--dtype", "int8"), "dtype is float32"),
        (("--model", "nano", "--frames", "4"), "take no videos"),
        (("--model", "nano", "--images", "0"), "at least one image"),
        (("--model", "nano", "--images", "3", "--visual-tokens", "256"), "equal parts"),
        (("--model", "nano", "--keep", "coverage:0.9"), "depends on what an image shows"),
        (("--model", "nano", "--images", "2", "--keep", "9,9,9"), "3 budgets, but the prompt has 2 images"),
        (("--model", "nano", "--method", "nothing"), "no method is called"),
        (("--model", "internvl3-8b", "--method", "tome"), "tome needs"),
    ],
)
def test_one_line_about_mistakes(foveate: Any, arguments: tuple[str, ...], message: str) -> None:
    result = foveate("cost", *arguments)
    assert result.code == 2
    assert message in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_a_guided_method_is_told_without_its_guide(foveate: Any) -> None:
    arguments = ("cost", "--model", "llava-1.5-7b", "--method", "sgl", "--keep", "64")
    assert foveate(*arguments, "--json").json["guided"] is True
    assert "without the small model that guides it" in foveate(*arguments).out
    assert foveate("cost", "--model", "nano", "--json").json["guided"] is False


def test_an_impossible_configuration_is_one_line(foveate: Any, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(WEIGHTS).to_dict()
    config["text_config"] |= {"hidden_size": 1024, "num_attention_heads": 15}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = foveate("cost", "--model", tmp_path)
    assert (result.code, len(result.err.strip().splitlines())) == (2, 1)
    assert "no usable model configuration" in result.err
