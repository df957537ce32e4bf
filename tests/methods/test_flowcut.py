"""FlowCut: score, schedule, and the whole tower against plain steps in float64."""

import copy
import math

import pytest
import torch
from greedy_cases import wave, wave_saliency
from tower_cases import reference

import foveate
from foveate import Budget
from foveate.core.encoder import Inside
from foveate.core.errors import FoveateError
from foveate.core.probes import Heads
from foveate.methods import FlowCut
from foveate.methods.flowcut import AttentionShare, Flow
from tiny import collate, embedded_rows, model, samples


def heads_of(attention, value):
    """One head, whose ``[CLS]`` row is a given attention to the patches; `value` has the row of ``[CLS]`` first."""
    n = len(attention)
    row = torch.tensor([1 - math.fsum(attention), *attention]).log()
    query = torch.zeros(n + 1, n + 1).index_copy(0, torch.tensor([0]), row[None])
    return Heads(query[None, None], torch.eye(n + 1)[None, None], torch.tensor(value)[None, None], 1.0, 1)


VALUE = [wave(17, 6, 1.2, 0.5)[16], *wave(16, 6, 1.2, 0.5)]
SCORE = [0.649616, 0.143572, 0.861745, 0.102777, 0.166124, 0.744433, 0.096110, 0.269785, 0.510331, 0.147206,
         0.565795, 1.534446, 0.201655, 0.868233, 1.072509, 0.640461]  # fmt: skip


def test_toy_of_the_score():
    score = Flow().read(heads_of(wave_saliency(16), VALUE))
    assert score[0].tolist() == pytest.approx(SCORE, abs=1e-5)
    assert sorted(score[0].topk(5).indices.tolist()) == [2, 5, 11, 13, 14]
    later = Flow().read(heads_of(wave_saliency(16)[::-1], VALUE))
    inside = Inside.start(1, 16, 1, torch.device("cpu"))
    for values, kept in ((score, [2, 5, 11, 13, 14]), (later, [2, 11, 13, 14, 15])):
        inside.planes[Flow()] = values
        into, memory = FlowCut(keep=5).step(inside, 5)
        assert [i for i, k in enumerate(into[0].tolist()) if k >= 0] == kept
        assert into[0][kept].tolist() == [0, 1, 2, 3, 4]
        inside = Inside.start(1, 16, 1, torch.device("cpu"))
        inside = Inside(inside.member, inside.sizes, {}, memory, 1)
    torch.testing.assert_close(memory, (score + later) / 2)


@pytest.mark.parametrize("lead", [0, 1, 3])
def test_score_of_several_heads(lead):
    query, key, value = (torch.randn(2, 3, 9 + lead, 4) for _ in range(3))
    got = Flow().read(Heads(query, key, value, 0.5, lead))
    for b in range(2):
        norm = value[b, :, lead:].double().mean(dim=0).abs().sum(dim=-1)
        if lead:
            rows = []
            for q, k, scale in ((query, key, 0.5), (value, value, 1.0)):
                row = (q[b, :, 0].double()[:, None] @ k[b].double().mT * scale).softmax(-1)[:, 0].mean(dim=0)[lead:]
                rows.append(row / row.sum())
            expected = (rows[0] + rows[1]) * norm
        else:
            mean = query[b].double().mean(dim=1, keepdim=True)
            expected = (mean @ key[b].double().mT * 0.5).softmax(-1)[:, 0].mean(dim=0) * norm
        torch.testing.assert_close(got[b].double(), expected, atol=1e-6, rtol=1e-5)


def test_toy_of_the_schedule():
    attention = wave_saliency(64)
    p = [a / math.fsum(attention) for a in attention]
    entropy = -math.fsum(x * math.log(x) for x in p) / math.log(64)
    assert entropy == pytest.approx(0.9044701505, abs=1e-9)
    assert (64 - 16) / 20**0.5 * (1 - entropy**2) == pytest.approx(1.952718, abs=1e-5)
    assert (64 - 16) / 2**0.5 * (1 - entropy**2) == pytest.approx(6.175035, abs=1e-5)
    reducer = FlowCut(keep=16, entropy=entropy)
    left = reducer.schedule(64, 16, 23)
    assert left[:2] == [64, 62]  # layer 1 has 20 layers to the last cut
    assert reducer.schedule(64, 16, 5) == [64, 58, 58, 16, 16]  # layer 1 has 2
    assert all(left[i] == left[i - 1] for i in range(2, 23, 2))  # no pruning at even layers
    assert left[21] == left[22] == 16


@pytest.mark.parametrize("entropy", [0.0, 0.5, 0.9, 1.0])
def test_schedule_hits_the_budget(entropy):
    for size, count, layers in ((576, 64, 23), (576, 1, 23), (64, 63, 2), (64, 5, 1), (9, 4, 12)):
        left = FlowCut(keep=1, entropy=entropy).schedule(size, count, layers)
        assert len(left) == layers
        assert left[-1] == count
        assert [size, *left] == sorted([size, *left], reverse=True)
    assert FlowCut(keep=1, entropy=1.0).schedule(576, 64, 23) == [576] * 21 + [64] * 2


def pruning(entropy):
    def act_for(lead, size, count):
        def act(layer, tokens, query, key, value):
            rows, n = [], len(tokens)
            for q, k, scale in ((query, key, query.shape[-1] ** -0.5), (value, value, 1.0)):
                row = (q[:, :1] @ k.mT * scale).softmax(-1)[:, 0].mean(dim=0)[lead:]
                rows.append(row / row.sum())
            share = entropy
            if entropy is None and n > 1:
                share = -math.fsum(p * math.log(p) for p in rows[0].tolist()) / math.log(n)
            if layer >= 3:  # one layer before the features, that of five
                left = count
            elif layer == 1 and n > count:
                left = max(n - round((n - count) / 2**0.5 * (1 - share**2)), count)
            else:
                left = n
            score = ((rows[0] + rows[1]) * value[:, lead:].mean(dim=0).abs().sum(-1)).tolist()
            noted = [{**t, "c": (t["c"] + s) / 2 if "c" in t else s} for t, s in zip(tokens, score, strict=True)]
            best = sorted(range(len(noted)), key=lambda i: -noted[i]["c"])[:left]
            return [noted[i] for i in sorted(best)]

        return act

    return act_for


def deeper(family):
    """A tiny model whose tower runs five of six layers, of which the second and the fourth prune."""
    net = model(family)
    for name, module in net.named_modules():
        if name.endswith("encoder.layers"):
            module.extend(copy.deepcopy(module))
            for layer in module:
                layer.self_attn.config = module[0].self_attn.config
    return net


@pytest.mark.parametrize("family", ["llava", "llava_next", "video_llava"])
@pytest.mark.parametrize("keep", [Budget(40, per="crop"), Budget(9, per="crop"), 27], ids=str)
@pytest.mark.parametrize("entropy", [0.3, None])
def test_the_tower_equals_plain_steps(family, keep, entropy):
    net, inputs = deeper(family), collate(samples(family))
    reduced = foveate.reduce(net, inputs, FlowCut(keep=keep, entropy=entropy))
    expected = reference(net, inputs, pruning(entropy), "mlp", keep)
    for chosen, embeds, (kept, _, rows) in zip(reduced.selection, embedded_rows(reduced), expected, strict=True):
        chosen.check()
        assert chosen.merge is None
        assert chosen.kept.tolist() == kept
        torch.testing.assert_close(embeds.double(), rows, atol=1e-4, rtol=1e-4)


def test_measured_entropy_decides_how_many_go():
    """The toy of the schedule, on one picture that is looked at as there, and on one that is looked at evenly."""
    reducer = FlowCut(keep=16)
    assert reducer.entropy is None
    for attention, first, second in (
        (wave_saliency(64), 62, 58),
        ([1 / 64] * 64, 64, 64),
        ([1.0] + [0.0] * 63, 53, 30),
    ):
        inside = Inside.start(1, 64, 1, torch.device("cpu"))
        share = torch.tensor([attention])
        inside.planes[AttentionShare()] = share / share.sum()
        assert reducer.left(inside, 16, 1, 23) == first  # 20 layers before the last cut
        assert reducer.left(inside, 16, 1, 5) == second  # 2 before it
        assert reducer.left(inside, 16, 2, 23) == 64
        assert reducer.left(inside, 16, 21, 23) == 16
    assert reducer.schedule(64, 16, 23) == [64] * 21 + [16] * 2  # the most that can be


def test_an_even_look_leaves_more_tokens_between_the_cuts():
    net, seen = deeper("llava"), []
    first = net.model.vision_tower.encoder.layers[2].self_attn
    first.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["hidden_states"].shape[:2])), with_kwargs=True
    )
    foveate.reduce(net, collate(samples("llava")), FlowCut(keep=20))
    assert {batch for batch, _ in seen} == {1}  # each crop has its own number
    assert all(21 <= n <= 65 for _, n in seen)


def test_layers_between_the_cuts_have_fewer_tokens():
    net, inputs, seen = deeper("llava"), collate(samples("llava")), []
    for layer in net.model.vision_tower.encoder.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
        )
    foveate.reduce(net, inputs, FlowCut(keep=20, entropy=0.9))
    assert seen == [65, 65, 59, 59, 21]  # round(44 / sqrt(2) * 0.19) go first
    assert FlowCut(keep=20, entropy=0.9).lengths(64, 20, 5) == [(64, 64), (64, 64), (58, 58), (58, 58), (20, 20)]


@pytest.mark.parametrize("bad", ["nan", "zero"])
def test_degenerate_scores_give_valid_tokens(bad):
    inside = Inside.start(1, 21, 1, torch.device("cpu"))
    inside.planes[Flow()] = torch.full((1, 21), {"nan": torch.nan, "zero": 0.0}[bad])
    for count in (1, 5, 20):
        into, _ = FlowCut(keep=count).step(inside, count)
        assert into[0].tolist() == [*range(count)] + [-1] * (21 - count)
    zeros = torch.zeros(1, 2, 5, 4)
    assert Flow().read(Heads(zeros, zeros, zeros, 0.5, 1)).tolist() == [[0.0] * 4]


def test_impossible_parameters_are_refused():
    with pytest.raises(FoveateError, match=r"entropy is a share .* not 1.5"):
        FlowCut(keep=8, entropy=1.5)
