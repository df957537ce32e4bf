"""What foveate tells and asks lmms-eval, as far as it works without lmms-eval."""

from __future__ import annotations

import importlib.util
import json

import pytest

from foveate import VisPruner
from foveate.core.budget import parse_keep
from foveate.core.errors import BudgetError, FoveateError, InputError, UnknownNameError
from foveate.eval import lmms
from foveate.eval.lmms_arguments import make_reducer


@pytest.mark.parametrize("keep", [64, "64", "0.25", 0.25, "coverage:0.9"])
def test_budgets_of_command_lines_are_understood(keep):
    made = make_reducer("vispruner", keep, important_ratio=0.3)
    assert made.important_ratio == 0.3
    assert made == VisPruner(keep=parse_keep(str(keep)), important_ratio=0.3)


def test_a_method_can_come_from_a_file(tmp_path):
    VisPruner(keep=7).save(tmp_path / "method.json")
    assert make_reducer(str(tmp_path / "method.json")) == VisPruner(keep=7)
    assert make_reducer(VisPruner(keep=7)) == VisPruner(keep=7)
    assert make_reducer(None) is None


@pytest.mark.parametrize(
    ("given", "kind", "fault"),
    [
        (("nonsense", 64), UnknownNameError, "no method is called 'nonsense'"),
        (("vispruner", "many"), BudgetError, "'many'"),
        (("vispruner", None), FoveateError, "lacks keep"),
        ((None, 64), InputError, "keep has no meaning"),
        (("missing.json", None), InputError, "cannot read the method from 'missing.json'"),
    ],
)
def test_wrong_methods_are_named(given, kind, fault):
    with pytest.raises(kind, match=fault):
        make_reducer(*given)


def test_without_lmms_eval_the_extra_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lmms_eval" else find(name))
    with pytest.raises(FoveateError, match=r"pip install 'foveate\[eval\]'"):
        lmms.run("nano", ["gqa"], "vispruner", 64)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"limit": 0}, {"frames": -1}])
def test_sizes_are_positive(wrong):
    with pytest.raises(InputError, match="at least 1"):
        lmms.run("nano", ["gqa"], **wrong)


def test_the_summary_counts_tokens_in_the_order_of_the_documents():
    def row(doc_id, kept, *seconds):
        same = {"visual_tokens": 256, "kept_tokens": kept, "equivalent_tokens": kept + 8.0, "output_tokens": 1}
        counts = [{**same, "seconds": s} for s in seconds]
        return {"doc_id": doc_id, "token_counts": counts}

    samples = {"gqa": [row(10, 30, 1.0), row(2, 34, 0.5)], "choice": [row(0, 32, 0.25, 0.25)]}
    assert lmms.summary(samples) == {
        "tasks": {
            "gqa": {
                "samples": 2, "visual_tokens": 256, "kept_tokens": 32, "equivalent_tokens": 40,
                "kept_per_sample": [34, 30], "model_seconds": 1.5,
            },
            "choice": {
                "samples": 1, "visual_tokens": 256, "kept_tokens": 32, "equivalent_tokens": 40,
                "kept_per_sample": [32], "model_seconds": 0.5,
            },
        }
    }  # fmt: skip
    json.dumps(lmms.summary(samples))
