"""`foveate check`: a table, a file, exit codes, and input that it refuses."""

from __future__ import annotations

import contextlib
import functools
import json

import pytest

import foveate.bench.check.run as checks
from faults import SIZES, KeepsOthersInBatches
from foveate.methods import Uniform

TINY = ("check", "--model", "tiny-llava-1.5-7b", "--device", "cpu")
ORDER = [
    "keep all, vispruner", "keep all, fastv", "pruned as hidden, vispruner", "pruned as hidden, fastv",
    "alone as in a batch, uniform", "alone as in a batch, free", "kept sets, before the LLM",
    "kept sets, inside the LLM", "host waits, selection", "host waits, decoding, before the LLM",
    "host waits, decoding, inside the LLM", "selection time", "speed, vispruner, batch 1", "speed, vispruner, batch 2",
    "speed, fastv, batch 1", "speed, fastv, batch 2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr("foveate.bench.check.speed.TURNS", 1)
    monkeypatch.setattr(checks, "check", functools.partial(checks.check, sizes=SIZES))


@pytest.mark.slow
def test_all_checks(foveate, tmp_path):
    result = foveate(*TINY, "--out", tmp_path / "check.json", "--json")
    assert result.code == 0, result.err
    assert result.json == json.loads((tmp_path / "check.json").read_text())
    assert result.json["command"].startswith("foveate check --model tiny-llava-1.5-7b --device cpu --out")
    words = {verdict["check"]: verdict["verdict"] for verdict in result.json["verdicts"]}
    assert list(words) == ORDER
    assert {words[name] for name in ORDER[:8]} == {"right"}
    assert {words[name] for name in ORDER[8:11]} == {"not run"}
    assert words["selection time"] == "measured"
    assert {words[name] for name in ORDER[12:]} <= {"right", "slower than unpruned"}
    config = result.json["config"]
    assert (config["dtype"], config["attention"], config["device"], config["minutes"]) == ("float32", "sdpa", "cpu", 8)
    assert result.json["machine"]["cores"] >= 1
    assert {"foveate", "torch", "transformers", "cuda"} <= result.json["versions"].keys()


def only(monkeypatch, *methods):
    monkeypatch.setattr(checks, "all_methods", lambda _: contextlib.nullcontext((methods, {})))


def test_something_wrong_ends_with_exit_code_1(foveate, tmp_path, monkeypatch):
    only(monkeypatch, Uniform(keep=9), KeepsOthersInBatches(keep=9))
    result = foveate(*TINY, "--out", tmp_path / "check.json")
    assert result.code == 1
    assert "[wrong] kept sets, before the LLM: keeps_others_in_batches: the same" in result.out
    assert "[right] keep all, vispruner: bit-identical" in result.out
    assert "KV cache" in result.out
    verdicts = json.loads((tmp_path / "check.json").read_text())["verdicts"]
    assert [verdict["check"] for verdict in verdicts if verdict["verdict"] == "wrong"] == ["kept sets, before the LLM"]


def test_without_time_nothing_is_run_and_nothing_is_left_out(foveate):
    result = foveate(*TINY, "--minutes", 0, "--json")
    assert result.code == 0, result.err
    assert len(result.json["verdicts"]) == len(ORDER)
    assert {verdict["verdict"] for verdict in result.json["verdicts"]} == {"not run"}
    assert all(verdict["said"] for verdict in result.json["verdicts"])


def test_a_model_with_weights(foveate, folder, monkeypatch):
    only(monkeypatch, Uniform(keep=9))
    result = foveate("check", "--model", folder, "--device", "cpu", "--json")
    assert result.code == 0, result.err
    assert result.json["config"]["layers"] == 2
    words = {verdict["check"]: verdict["verdict"] for verdict in result.json["verdicts"]}
    assert words["pruned as hidden, vispruner"] == words["pruned as hidden, fastv"] == "right"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--device", "cuda"), "PyTorch finds no CUDA device 'cuda': pass --device cpu"),
        (("--device", "tpu9"), "a device is 'cpu', 'cuda' or 'cuda:1', not 'tpu9'"),
        (("--device", "meta"), "not 'meta'"),
        (("--model", "llava-1.5-7"), "did you mean 'llava-1.5-7b'?"),
        (("--model", "tiny-llava-9b"), "any of them behind 'tiny-'"),
        (("--model", "tiny-llava-1.5-7b", "--attn", "flash_attention_2"), "flash_attention_2 runs on a GPU"),
        (("--model", "tiny-llava-1.5-7b", "--attn", "flesh"), "cannot make this model"),
        (("--model", "tiny-llava-1.5-7b", "--dtype", "int8"), "not 'int8'"),
        (("--minutes", -1), "--minutes"),
    ],
    ids=str,
)
def test_refused(foveate, given, said, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    result = foveate("check", *given)
    assert result.code == 2
    assert said in " ".join(result.err.split())
    assert not result.out
