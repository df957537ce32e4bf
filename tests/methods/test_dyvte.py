"""DyVTE and exits by rule: features, gates and their file, and when tokens leave."""

from __future__ import annotations

import threading

import pytest
import torch
from layer_cases import layer_tokens
from safetensors.torch import save_file

import foveate
from foveate import FoveateError
from foveate.core.errors import BudgetError
from foveate.core.exit_gates import Gate, Gates, feature
from foveate.core.in_llm import tokens_per_layer
from foveate.core.probes import LayerAttention
from foveate.engines.transformers.caches import cache_of
from foveate.methods import DyVTE, VisualExit
from tiny import collate, deep_model, sample, samples


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a.float(), b.float(), atol=tolerance, rtol=tolerance)


def answering(logits):
    """Make a gate of width 2 that answers the same whatever it reads, given (keep, leave)."""
    gate = Gate(2, 1)
    with torch.no_grad():
        gate.w1.weight.zero_()
        gate.w1.weight[0, 2:] = 1.0  # the last state
        state = torch.nn.functional.gelu(torch.tensor(2.0))
        gate.w2.weight[:, 0] = torch.tensor(logits) / state
    return gate


def saved(path, gates_by_layer):
    gates = Gates(list(gates_by_layer), 2, 1)
    for layer, gate in gates_by_layer.items():
        gates.visual_gates_router[str(layer)] = gate
    gates.save(path)
    return str(path)


def test_feature_of_the_toy():
    text = torch.tensor([[1.0, 0.0], [3.0, 2.0], [9.0, 9.0]])
    assert feature(text).tolist() == [2, 1, 9, 9]
    assert feature(text[:1]).tolist() == [1, 0, 1, 0]


def test_feature_of_a_prompt_of_eight_tokens():
    states = torch.arange(8.0)[:, None]
    assert feature(states[5:8]).tolist() == [5.5, 7.0]


def test_toy_of_four_layers(tmp_path):
    path = saved(
        tmp_path / "g.safetensors", {0: answering((1.0, 0.0)), 1: answering((0.2, 0.1)), 2: answering((0, 0.3))}
    )
    method, text = DyVTE(gates=path), (torch.ones(2, 2),)
    assert list(method.boundaries(4)) == [1, 2, 3]
    left = [len(method.select(layer_tokens([3], boundary=b, text=text))[0]) for b in method.boundaries(4)]
    assert left == [3, 3, 0]
    received = [3, *left]  # layers 0 to 2 see the tokens
    assert sum(received) / 4 == 2.25


def test_a_tie_keeps_and_a_bias_moves_the_threshold(tmp_path):
    path = saved(tmp_path / "g.safetensors", {0: answering((0.3, 0.3)), 1: answering((0.0, 0.5))})
    tokens = layer_tokens([3], text=(torch.ones(1, 2),))
    assert len(DyVTE(gates=path).select(tokens)[0]) == 3
    assert len(DyVTE(gates=path, bias=-0.1).select(tokens)[0]) == 0
    later = layer_tokens([3], boundary=2, text=(torch.ones(1, 2),))
    assert len(DyVTE(gates=path, bias=0.6).select(later)[0]) == 3
    assert len(DyVTE(gates=path, bias=0.4).select(later)[0]) == 0


def test_without_text_or_gate_the_tokens_stay(tmp_path):
    path = saved(tmp_path / "g.safetensors", {0: answering((0.0, 9.0))})
    tokens = layer_tokens([3, 2], text=(torch.empty(0, 2), torch.ones(1, 2)))
    assert [len(s) for s in DyVTE(gates=path).select(tokens)] == [3, 0]
    assert len(DyVTE(gates=path).select(layer_tokens([3], boundary=2, text=(torch.ones(1, 2),)))[0]) == 3


@pytest.mark.parametrize(("width", "depth", "each", "all_layers"), [
    (4096, 32, 16_781_312, 537_001_984), (5120, 40, 20_975_616, 839_024_640)])  # fmt: skip
def test_numbers_of_weights(width, depth, each, all_layers):
    with torch.device("meta"):
        gates = Gates(range(depth), width)
    assert sum(p.numel() for p in gates.of(0).parameters()) == each
    assert sum(p.numel() for p in gates.parameters()) == all_layers


@pytest.mark.parametrize(("e", "mean"), [(8, 162), (12, 234), (15, 288), (20, 378), (24, 450), (28, 522)])
def test_mean_tokens_of_an_exit_behind_a_layer(e, mean):
    received = tokens_per_layer(VisualExit(keep=(e + 1) / 32), 32, 576)
    assert sum(received) / 32 == mean == 18 * (e + 1)


def test_file_with_the_names_of_the_authors(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = {f"model.visual_gates_router.{i}.{name}.weight": torch.randn(*shape, generator=generator)
               for i in range(4) for name, shape in (("w1", (5, 64)), ("w2", (2, 5)))}  # fmt: skip
    save_file({**weights, "model.norm.weight": torch.ones(3)}, tmp_path / "model-1.safetensors")
    gates = Gates.load(tmp_path)
    assert gates.layers == [0, 1, 2, 3]
    x = torch.randn(64, generator=generator)
    w1, w2 = (weights[f"model.visual_gates_router.2.{name}.weight"] for name in ("w1", "w2"))
    hidden = w1 @ x
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(gates.of(2)(x), w2 @ hidden)
    gates.save(tmp_path / "again" / "g.safetensors")
    again = Gates.load(tmp_path / "again" / "g.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(gates.parameters(), again.parameters(), strict=True))
    assert Gates.load(tmp_path, first=2).layers == [2, 3]


def test_bad_gates_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(FoveateError, match="no gates in"):
            DyVTE(gates=path)
    save_file({"other": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(FoveateError, match="no weights of that name"):
        DyVTE(gates=tmp_path / "other.safetensors")
    path = saved(tmp_path / "g.safetensors", {0: answering((0.0, 1.0))})
    with pytest.raises(FoveateError, match=r"width 2 .* width 32"):
        foveate.attach(deep_model("llava"), DyVTE(gates=path))
    with pytest.raises(BudgetError, match="least share of the layers"):
        DyVTE(gates=path, keep=64)
    Gates(range(9), 32, 4).initialise().save(tmp_path / "deep.safetensors")
    with pytest.raises(FoveateError, match="at least 9 layers"):
        foveate.attach(deep_model("llava"), DyVTE(gates=tmp_path / "deep.safetensors"))


def test_rules_by_hand():
    text = LayerAttention("text")
    mass = layer_tokens([3, 3], planes={text: [torch.tensor([0.03, 0.02, 0.01]), torch.tensor([0.05, 0.04, 0.03])]},
                        text=(torch.ones(2, 2), torch.ones(2, 2)))  # fmt: skip
    assert [len(s) for s in VisualExit(rule="mass").select(mass)] == [0, 3]
    assert [len(s) for s in VisualExit(rule="mass", threshold=0.05).select(mass)] == [3, 3]
    states = (torch.tensor([[9.0, 9.0], [1.0, 0.0]]),)
    turned = layer_tokens([3], text=states, text_before=(torch.tensor([[0.0, 1.0], [1.0, 1.0]]),))
    assert len(VisualExit(rule="converged", threshold=0.70).select(turned)[0]) == 0  # a cosine of 0.7071
    assert len(VisualExit(rule="converged", threshold=0.72).select(turned)[0]) == 3
    with pytest.raises(FoveateError, match="no threshold"):
        VisualExit(threshold=0.5)
    with pytest.raises(FoveateError, match="'fixed', 'mass' or 'converged'"):
        VisualExit(rule="never")


def gates_for(tmp_path, fire):
    """Make gates for the tiny model that fire behind the layers given by number."""
    gates = Gates(range(4), 32, 1)
    with torch.no_grad():
        for layer in range(4):
            gate = gates.of(layer)
            gate.w1.weight.zero_()
            gate.w2.weight.zero_()
    path = tmp_path / f"fire{fire}.safetensors"
    gates.save(path)
    return DyVTE(gates=str(path), bias=-1.0 if fire else 1.0, keep=fire / 4 if fire else None)


def test_gates_that_never_fire_change_nothing(tmp_path):
    net, inputs = deep_model("llava"), collate(samples("llava"))
    plain = net.generate(**inputs, max_new_tokens=9, return_dict_in_generate=True, output_logits=True)
    with foveate.attach(net, gates_for(tmp_path, 0)) as handle:
        out = net.generate(**inputs, max_new_tokens=9, return_dict_in_generate=True, output_logits=True)
    assert handle.layers == {}
    assert torch.equal(torch.stack(out.logits), torch.stack(plain.logits))


@pytest.mark.parametrize("boundary", [1, 2, 3])
def test_caches_and_positions_behind_an_exit(tmp_path, boundary):
    net, inputs = deep_model("llava"), collate([sample(4, "image", 5)])
    seen = []
    rotary = net.get_decoder().rotary_emb
    hook = rotary.register_forward_pre_hook(lambda _, a, k: seen.append(k["position_ids"].tolist()), with_kwargs=True)
    with foveate.attach(net, gates_for(tmp_path, boundary)) as handle:
        out = net.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    hook.remove()
    assert list(handle.layers) == [boundary]
    sizes = [layer.get_seq_length() for layer in cache_of(out).layers]
    assert sizes == [73 + 2] * boundary + [9 + 2] * (4 - boundary)
    assert [ids[0][-1] for ids in seen] == [72, 73, 74]  # all layers count on from the whole prompt


def test_gates_are_used_in_the_prefill_only(tmp_path, monkeypatch):
    calls = []
    forward = Gate.forward
    monkeypatch.setattr(Gate, "forward", lambda self, x: calls.append(1) or forward(self, x))
    net, inputs = deep_model("llava"), collate([sample(4, "image", 5)])
    with foveate.attach(net, gates_for(tmp_path, 0)):
        net.generate(**inputs, max_new_tokens=6)
    assert len(calls) == 3


def test_prompts_of_a_batch_leave_at_layers_of_their_own(tmp_path):
    """Gates that look at the last token's state fire for one prompt and not for the other."""
    net, rows = deep_model("llava"), [sample(4, "image", 5, seed=1), sample(2, "image", 3, "image", 6, seed=2)]
    states = []
    for row in rows:
        inputs = collate([row])
        with torch.no_grad():
            states.append([h[0, -1] for h in net(**inputs, output_hidden_states=True).hidden_states])
    gates = Gates(range(4), 32, 2)
    with torch.no_grad():
        for layer in range(4):
            gate, difference = gates.of(layer), states[1][layer + 1] - states[0][layer + 1]
            gate.w1.weight.zero_()
            gate.w1.weight[0, 32:], gate.w1.weight[1, 32:] = difference, -difference
            gate.w2.weight.zero_()
            # The first fires behind layer 0 or 1, the second one behind layer 2 at the latest.
            gate.w2.weight[1] = torch.tensor([[-5.0, 5.0], [5.0, -5.0]][layer % 2]) if layer < 2 else 5.0
    gates.save(tmp_path / "g.safetensors")
    method = DyVTE(gates=tmp_path / "g.safetensors")
    alone = []
    for row in rows:
        with foveate.attach(net, method) as handle, torch.no_grad():
            logits = net(**collate([row])).logits[0]
            alone.append((max(handle.layers), logits))
    assert {boundary for boundary, _ in alone} == {1, 2}
    for side in ("left", "right"):
        inputs = collate(rows, side)
        with foveate.attach(net, method) as handle, torch.no_grad():
            together = net(**inputs).logits
        assert list(handle.layers) == [1, 2]
        for i, (_, logits) in enumerate(alone):
            close(together[i, inputs["attention_mask"][i].bool()], logits)


def test_threads_do_not_meet(tmp_path):
    net, batches = deep_model("llava"), [collate([row]) for row in samples("llava")]
    method = DyVTE(gates=_random_gates(tmp_path))
    with foveate.attach(net, method):
        single = [net.generate(**b, max_new_tokens=5).tolist() for b in batches]
        found = [[] for _ in batches]

        def work(i):
            for _ in range(3):
                found[i].append(net.generate(**batches[i], max_new_tokens=5).tolist())

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert found == [[x] * 3 for x in single]


def _random_gates(tmp_path):
    path = tmp_path / "random.safetensors"
    Gates(range(4), 32, 16).initialise(6).save(path)
    return path
