"""The search for VFlowOpt's parameters: its objective against plain passes, its search space, and its command."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import torch

import foveate
from foveate.core.errors import FoveateError, InputError, UnsupportedModelError
from foveate.fit.vflowopt import PENALTY, calibrate, mean_share
from foveate.methods import VFlowOptAll
from tiny import collate, deep_model, sample

needs_optuna = pytest.mark.skipif(find_spec("optuna") is None, reason="foveate[calibrate]")


def prompts(count=2):
    return [collate([sample(3, "image", 4 + i, seed=i)]) for i in range(count)]


def cosine(net, inputs, reducer):
    """Return the objective of one prompt from the model's own list of hidden states."""
    with torch.no_grad():
        plain = net(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
        with foveate.attach(net, reducer):
            pruned = net(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
    return torch.cosine_similarity(plain, pruned, dim=0).item()


@needs_optuna
def test_search():
    net, inputs, seen = deep_model("llava"), prompts(), []
    found = calibrate(net, inputs, 0.25, calls=9, initial=6, seed=3, done=seen.append)
    assert tuple(seen) == found.scores
    assert len(found.scores) == 9
    assert found.score == max(found.scores)
    assert len(set(found.scores)) > 5
    first, second, last = found.reducer.ratios
    assert 0.25 <= first <= 0.375
    assert 0.8 / 1.5 <= second <= 1.0
    assert 0 < last <= 1.0
    assert found.share == pytest.approx(mean_share(4, (1, 3), found.reducer.ratios))
    assert found.share == pytest.approx(0.25) or last == 1.0
    assert 0 <= found.reducer.t <= 50
    assert 3 * 8 / 27 <= found.reducer.a <= 24 * 8 / 27
    expected = sum(cosine(net, x, found.reducer) for x in inputs) / 2
    assert found.score == pytest.approx(expected, abs=1e-5)
    default = sum(cosine(net, x, VFlowOptAll(keep=0.25)) for x in inputs) / 2
    assert found.default == pytest.approx(default, abs=1e-5)
    assert foveate.engines.transformers.attach.attached(net) is None


@needs_optuna
def test_the_same_seed_gives_the_same_search():
    net, inputs = deep_model("llava"), prompts(1)
    one, two, other = (calibrate(net, inputs, 0.5, calls=4, initial=4, seed=seed) for seed in (1, 1, 2))
    assert one == two
    assert one.reducer != other.reducer


@needs_optuna
def test_parameters_that_miss_the_budget_are_punished(monkeypatch):
    import foveate.fit.vflowopt as module

    plain, calls = module.last_ratio, []
    monkeypatch.setattr(module, "last_ratio", lambda *a: calls.append(a) or (None if len(calls) == 2 else plain(*a)))
    found = calibrate(deep_model("llava"), prompts(1), 0.25, calls=3, initial=3)
    assert found.scores[1] == PENALTY
    assert found.score > PENALTY
    monkeypatch.setattr(module, "last_ratio", lambda *a: None)
    with pytest.raises(FoveateError, match=r"none of 2 calls met a budget of 0\.25"):
        calibrate(deep_model("llava"), prompts(1), 0.25, calls=2, initial=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 1.0}, "below 1.0, not 1.0"),
        ({"keep": 64}, "a share of the tokens such as 0.25"),
        ({"calls": 3}, "of 3 calls 27"),
        ({"initial": 0}, "1 <= initial <= calls"),
        ({"prompts": []}, "at least one prompt"),
    ],
)
def test_impossible_arguments_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        calibrate(**{"model": deep_model("llava"), "prompts": prompts(1), "keep": 0.25, **change})


@needs_optuna
def test_prompts_and_models_that_do_not_fit():
    rows = [sample(3, "image", 4), sample(3, "image", 9)]
    for inputs in (collate(rows), collate([*rows[:1], sample(90)], side="right")):
        with pytest.raises(InputError, match="one prompt at a time"):
            calibrate(deep_model("llava"), [inputs], 0.25)
    with pytest.raises(InputError, match="a prompt of the calibration set holds no image"):
        calibrate(deep_model("llava"), [collate([sample(5)])], 0.25)
    with pytest.raises(UnsupportedModelError, match="needs the attention layers of the vision encoder"):
        calibrate(deep_model("fast_vlm"), prompts(1), 0.25)


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(FoveateError, match=r"calibration needs optuna: pip install 'foveate\[calibrate\]'"):
        calibrate(deep_model("llava"), prompts(1), 0.25)
