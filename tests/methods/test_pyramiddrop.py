"""PyramidDrop: counts, positions and the two-stage toy of its specification, and budgets per layer."""

import pytest
import torch
from layer_cases import layer_tokens

import foveate
from foveate.core.errors import BudgetError, FoveateError
from foveate.core.in_llm import tokens_per_layer
from foveate.core.probes import LayerAttention
from foveate.engines.transformers.caches import cache_of
from foveate.methods import PyramidDrop
from tiny import collate, deep_model, sample

ATTENTION = LayerAttention("last", ahead=True)


def test_toy_of_two_stages():
    scores = torch.tensor([0.02, 0.10, 0.05, 0.10, 0.01, 0.20, 0.03, 0.04])
    (first,) = PyramidDrop().select(layer_tokens([8], [4], {ATTENTION: [scores]}))
    assert first.kept.tolist() == [1, 2, 3, 5]
    survivors = torch.tensor([0.1, 0.3, 0.05, 0.3])
    (second,) = PyramidDrop().select(layer_tokens([4], [2], {ATTENTION: [survivors]}, boundary=2))
    assert first.kept[second.kept].tolist() == [2, 5]


@pytest.mark.parametrize(("tokens", "counts"), [(576, [288, 144, 72]), (577, [288, 144, 72]), (8, [4, 2, 1])])
def test_counts_are_rounded_down(tokens, counts):
    assert PyramidDrop().counts(32, [("image", tokens)]) == counts


def test_schedule():
    schedule = tokens_per_layer(PyramidDrop(), 32, 576)
    assert schedule == (576,) * 8 + (288,) * 8 + (144,) * 8 + (72,) * 8
    assert sum(schedule) == 8640
    assert sum(schedule) / 32 == 270
    assert tokens_per_layer(PyramidDrop(layers=(1, 2, 3)), 4, 8) == (8, 4, 2, 1)
    assert sum(tokens_per_layer(PyramidDrop(layers=(1, 2, 3)), 4, 8)) / 4 == 3.75
    assert PyramidDrop().boundaries(28) == (7, 14, 21)
    assert PyramidDrop().boundaries(2) == (1,)


def test_a_stage_may_end_up_without_visual_tokens():
    assert PyramidDrop(keep=0.25).counts(32, [("image", 8)]) == [2, 0, 0]
    net, inputs = deep_model("llava"), collate([sample(4, "image", 5)])
    with foveate.attach(net, PyramidDrop(keep=0.1)) as handle:
        out = net.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert [layer.get_seq_length() for layer in cache_of(out).layers] == [75, 17, 11, 11]
    assert handle.selections[0][0].kept.tolist() == []


@pytest.mark.parametrize(
    ("target", "layers", "share", "counts", "mean"),
    [
        (192, (8, 16, 24), 0.2535, [146, 37, 9], 192.0),
        (192, (4, 8, 16), 0.5278, [304, 160, 84], 192.0),
        (128, (4, 8, 16), 0.3542, [204, 72, 25], 128.0),
        (128, (2, 6, 15), 0.4486, [258, 115, 52], 128.2),
        (64, (2, 8, 16), 0.1927, [111, 21, 4], 64.06),
        (64, (2, 6, 15), 0.2282, [131, 30, 6], 64.0),
    ],
)
def test_equivalent_tokens(target, layers, share, counts, mean):
    solved = PyramidDrop(layers=layers, equivalent=target).solved(32, 576)
    assert solved.keep == pytest.approx(share, abs=6e-5)
    assert solved.counts(32, [("image", 576)]) == counts
    assert sum(tokens_per_layer(solved, 32, 576)) / 32 == pytest.approx(mean, abs=0.03)


def test_decoded_tokens_are_counted_along_what_each_stage_holds():
    """The toy: 2 + 8 + 3 tokens; the first decoded one has the positions 13, 9, 7 and 6 in the four stages."""
    net, inputs = deep_model("llava"), collate([sample(4, "image", 5)])
    seen = []
    rotary = net.get_decoder().rotary_emb
    original = rotary.forward

    def watch(x, position_ids, *args, **kwargs):
        seen.append(position_ids.flatten().tolist())
        return original(x, position_ids, *args, **kwargs)

    rotary.forward = watch
    with foveate.attach(net, PyramidDrop(layers=(1, 2, 3))):
        net.generate(**inputs, max_new_tokens=3, do_sample=False)
    decoded = [positions for positions in seen if len(positions) == 1]
    assert decoded == [[73], [41], [25], [17], [74], [42], [26], [18]]
    prefill = [positions for positions in seen if len(positions) > 1]
    assert prefill[-3:] == [list(range(41)), list(range(25)), list(range(17))]


def test_the_look_ahead_equals_the_layers_own_attention():
    """What is read at a boundary is the attention of the layer behind it, had nothing been dropped."""
    net, inputs = deep_model("llava", "eager"), collate([sample(4, "image", 5)])
    maps = net(**inputs, output_attentions=True).attentions
    for layer in (1, 2, 3):
        scores = maps[layer][0, :, -1].mean(dim=0)[4:68]
        with foveate.attach(net, PyramidDrop(keep=0.25, layers=(layer,))) as handle, torch.no_grad():
            net(**inputs)
        assert handle.selections[0][0].kept.tolist() == sorted(scores.argsort(descending=True)[:16].tolist())


def test_bad_parameters():
    for keep in (2, 0.0, 1.5, "0.5"):
        with pytest.raises(BudgetError, match="equivalent="):
            PyramidDrop(keep=keep)
    for layers in ((), (3, 2), (0, 4)):
        with pytest.raises(FoveateError, match="ascend from 1"):
            PyramidDrop(layers=layers)
    with pytest.raises(BudgetError, match=r"144 on average; use earlier layers"):
        PyramidDrop(equivalent=128).counts(32, [("image", 576)])
