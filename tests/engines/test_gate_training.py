"""Training of the gates of DyVTE: labels, observations of a frozen model, and the steps."""

from __future__ import annotations

import itertools

import pytest
import torch
from layered import layered

import foveate
from foveate import FoveateError
from foveate.core.exit_gates import Gates
from foveate.fit import gates as gate_training
from foveate.fit.gates import Examples, fit, may_leave, observe
from foveate.methods import VisualExit
from tiny import collate, deep_model, sample


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a.float(), b.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("agreement", "without", "label"), [
    (1.0, 0.82, True), (1.0, 0.83, False), (2 / 3, 0.1, False)])  # fmt: skip
def test_labels(agreement, without, label):
    assert may_leave(agreement, 0.80, without) is label


def test_loss_of_the_toy():
    logits = torch.tensor([[0.2, 1.2]])
    torch.testing.assert_close(logits.softmax(1), torch.tensor([[0.268941, 0.731059]]), atol=1e-6, rtol=0)
    for label, loss in ((1, 0.313262), (0, 1.313262)):
        gates = Gates([0], 1, 1)
        with torch.no_grad():
            gates.of(0).w1.weight[:] = torch.tensor([[0.0, 1.0]])
            gates.of(0).w2.weight[:, 0] = torch.tensor([0.2, 1.2]) / torch.nn.functional.gelu(torch.tensor(1.0))
        examples = Examples(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), torch.tensor([label]))
        assert fit(gates, examples)[0] == pytest.approx(loss, abs=1e-6)


def labelled(rows=3, side="left"):
    """Make a batch whose last two tokens are the answer."""
    inputs = collate([sample(3, "image", 6 + i, seed=i) for i in range(rows)], side)
    labels = torch.full_like(inputs["input_ids"], -100)
    for i, mask in enumerate(inputs["attention_mask"]):
        last = int(mask.nonzero()[-1])
        labels[i, last - 1 : last + 1] = inputs["input_ids"][i, last - 1 : last + 1]
    return {**inputs, "labels": labels}


@pytest.mark.parametrize("side", ["left", "right"])
def test_observations_equal_a_run_with_hidden_columns(side):
    net, inputs = deep_model("llava"), labelled(side=side)
    plain = {k: v for k, v in inputs.items() if k != "labels"}
    with torch.no_grad():
        full = net(**plain, output_hidden_states=True)
    found = observe(net, inputs, range(4), 0.4, 1.2)
    examples = {}
    for layer in range(3):
        with foveate.attach(net, VisualExit(keep=(layer + 1) / 4)) as handle, torch.no_grad():
            net(**plain)
        hidden = layered(net, plain, handle.layers)
        for i in range(3):
            columns = (inputs["labels"][i] >= 0).nonzero().flatten()
            start = int((inputs["input_ids"][i] == 120).nonzero()[-1]) + 1
            ids = inputs["labels"][i, columns]
            one, other = (x[i, columns - 1] for x in (full.logits, hidden))
            losses = [torch.nn.functional.cross_entropy(x, ids).item() for x in (one, other)]
            same = (one.argmax(1) == other.argmax(1)).float().mean().item()
            text = full.hidden_states[layer + 1][i, start : columns[0]]
            examples[layer, i] = (torch.cat([text[:-1].mean(0), text[-1]]), int(may_leave(same, *losses, 0.4, 1.2)))
    assert found.layers.tolist() == [layer for layer in range(4) for _ in range(3)]
    for k, (layer, i) in enumerate(itertools.product(range(3), range(3))):
        close(found.features[k], examples[layer, i][0])
        assert found.labels[k] == examples[layer, i][1]
    assert found.labels[-3:].tolist() == [1, 1, 1]  # behind the last layer nothing changes
    assert 0 < found.labels[:9].sum() < 9


def test_prompts_that_teach_nothing_are_left_out():
    net = deep_model("llava")
    inputs = collate(
        [sample(3, "image", 6), sample(80, seed=1), sample(3, "image", 2, seed=2), sample(3, "image", 5, seed=3)]
    )
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]  # the third one's answer follows its image at once
    found = observe(net, {**inputs, "labels": labels}, [0, 3])
    assert found.layers.tolist() == [0, 0, 3, 3]  # of the first and the last prompt
    assert len(observe(net, {**inputs, "labels": torch.full_like(labels, -100)}, [0])) == 0
    with pytest.raises(FoveateError, match="needs labels"):
        observe(net, inputs, [0])
    labels[0, -4] = 5
    with pytest.raises(FoveateError, match="answers in several places"):
        observe(net, {**inputs, "labels": labels}, [0])
    with pytest.raises(FoveateError, match="no batch"):
        foveate.train_gates(net, [])


def test_training_touches_one_gate_per_step_and_no_other_weight(monkeypatch):
    net, batches = deep_model("llava"), [labelled(2), labelled(3)]
    net(**batches[0], output_hidden_states=True)  # transformers hangs hooks of its own into the model
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    before = {name: p.clone() for name, p in net.named_parameters()}
    drawn, steps = [], []
    plain = gate_training.observe

    def observing(model, inputs, layers, *args):
        drawn.append(list(layers))
        return plain(model, inputs, layers, *args)

    monkeypatch.setattr(gate_training, "observe", observing)
    step = torch.optim.AdamW.step

    def stepping(self, *args, **kwargs):
        steps.append([p.grad is not None for group in self.param_groups for p in group["params"]])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", stepping)
    gates = foveate.train_gates(net, batches, hidden=8, learning_rate=1e-2, exits=2)
    assert [len(layers) for layers in drawn] == [2, 2]
    assert len(steps) == len({layer for layers in drawn for layer in layers})
    assert all(sum(grads) == 2 for grads in steps)
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
    fresh = Gates(range(4), 32, 8).initialise(0)
    trained = {layer for layers in drawn for layer in layers}
    for layer in range(4):
        assert torch.equal(gates.of(layer).w1.weight, fresh.of(layer).w1.weight) == (layer not in trained)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()] == hooks


def test_gates_learn():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 16, generator=generator)
    layers, labels = torch.arange(400) % 2, (features[:, 3] > 0.2).long()
    labels[1::2] = (features[1::2, 8] < 0).long()
    gates = Gates(range(2), 8, 32).initialise()
    losses = fit(gates, Examples(features, layers, labels), epochs=60, batch=32, learning_rate=3e-3)
    assert sum(losses[-20:]) < 0.3 * sum(losses[:20])
    for layer in range(2):
        right = gates.of(layer)(features[layers == layer]).argmax(1) == labels[layers == layer]
        assert right.float().mean() > 0.95
