"""Arguments that name columns of the prompt, and position ids that a model throws away."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.core.errors import UnsupportedModelError
from tiny import VISUALS, collate, model, sample


@torch.no_grad()
def test_shift_labels_have_the_loss_of_labels():
    for family in ("llava", "internvl", "qwen2_5_vl"):
        net = model(family)
        batch = collate([sample(4, VISUALS[family][0], 5, seed=1)], labels=True)
        labels = batch.pop("labels")
        shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        with foveate.attach(net, "uniform", keep=0.4):
            want = net(**batch, labels=labels)
            got = net(**batch, labels=labels, shift_labels=shifted)
        assert torch.allclose(got.loss, want.loss, atol=1e-5)


@torch.no_grad()
def test_logits_to_keep_names_columns_of_the_full_prompt():
    for family in ("llava", "internvl", "qwen2_5_vl"):
        net = model(family)
        batch = collate([sample(4, VISUALS[family][0], 5, seed=1)])
        last = batch["input_ids"].shape[1] - 1
        with foveate.attach(net, "uniform", keep=0.4):
            want = net(**batch).logits
            got = net(**batch, logits_to_keep=torch.tensor([1, last - 2, last])).logits
        assert torch.allclose(got, want[:, [1, -3, -1]], atol=1e-5)


@torch.no_grad()
def test_position_ids_that_generate_throws_away_are_refused(monkeypatch):
    net = model("llava")
    batch = collate([sample(4, VISUALS["llava"][0], 5, seed=1)])
    prepare = net.prepare_inputs_for_generation

    def without(*args, **kwargs):
        return {**prepare(*args, **kwargs), "position_ids": None}

    monkeypatch.setattr(net, "prepare_inputs_for_generation", without)
    refused = pytest.raises(UnsupportedModelError, match="throws position_ids away")
    with foveate.attach(net, "uniform", keep=0.4, positions="original"), refused:
        net.generate(**batch, max_new_tokens=2)
