"""VisionDrop's stages inside the LLM against the specification's numbers and its rules written out in plain steps."""

import math
from dataclasses import replace

import pytest
import torch
from layer_cases import layer_tokens
from merge_cases import cosine

import foveate
from foveate import Budget
from foveate.core.errors import BudgetError, FoveateError
from foveate.core.probes import LayerKeys
from foveate.core.spans import Crop
from foveate.engines.transformers.caches import cache_of
from foveate.methods import VisionDrop, VisionDropAll, VisionDropLlm, VisionZip
from foveate.methods.visiondrop import SEEN
from tiny import collate, deep_model, sample, visual_tokens


def causal_attention(logits):
    """Return attention from rows of logits of growing length: softmax to the base 2 over those given, zero behind."""
    out = torch.zeros(len(logits), len(logits), dtype=torch.float64)
    for i, row in enumerate(logits):
        weight = torch.tensor(row, dtype=torch.float64).exp2()
        out[i, : len(row)] = weight / weight.sum()
    return out


# Eight tokens: 0 system, 1 to 6 visual, 7 text. Rows 1 to 6; the first row sees itself alone.
ROWS = [[0], [1, 0], [1, 0, 1], [0, 1, 2, 0], [0, 1, 2, 1, 0], [0, 0, 2, 1, 3, 0], [0, 0, 1, 1, 3, 1, 2]]
TOY = causal_attention([*ROWS, [0] * 8])[1:7, 1:7]
STATES = torch.tensor([[2.0, 1], [3, 5], [0, 4], [3, 3], [5, 1], [1, 7]])
METRIC = torch.tensor([[0.3, 0.1], [0.5, 0.9], [1, 0.2], [0.1, 1], [1, 1], [0.9, 0.3]])


def toy(count, **further):
    attention = TOY.mean(dim=0).float()
    return layer_tokens([6], [count], {SEEN: [attention], LayerKeys(): [METRIC]}, **further)


def kept(selection):
    return [span.kept.tolist() for span in selection]


def test_toy_attention():
    expected = [
        [0.333333, 0, 0, 0, 0, 0],
        [0.2, 0.4, 0, 0, 0, 0],
        [0.25, 0.5, 0.125, 0, 0, 0],
        [0.2, 0.4, 0.2, 0.1, 0, 0],
        [0.058824, 0.235294, 0.117647, 0.470588, 0.058824, 0],
        [0.05, 0.1, 0.1, 0.4, 0.1, 0.2],
    ]
    torch.testing.assert_close(TOY, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    mean = [0.182026, 0.272549, 0.090441, 0.161765, 0.026471, 0.033333]
    assert TOY.mean(dim=0).tolist() == pytest.approx(mean, abs=1e-6)


def test_toy_dominant_tokens_and_the_bias_of_the_mean_over_all_rows():
    for rows, expected in (("all", [0, 1]), ("visible", [1, 3])):
        reducer = VisionDropLlm(keep=2, contextual_ratio=0.0, rows=rows)
        assert kept(reducer.select(toy(2))) == [expected]


def test_toy_mean_over_visible_rows():
    from foveate.methods.visiondrop import _over_visible_rows

    (found,) = _over_visible_rows(toy(2)).probe(SEEN)
    assert found.tolist() == pytest.approx([0.182026, 0.327059, 0.135662, 0.323529, 0.079412, 0.2], abs=1e-6)


def test_toy_merge():
    assert cosine([0.1, 1], [1, 0.2]) == pytest.approx(0.292714, abs=1e-6)
    assert cosine([0.1, 1], [1, 1]) == pytest.approx(0.773957, abs=1e-6)
    assert cosine([0.9, 0.3], [1, 0.2]) == pytest.approx(0.992278, abs=1e-6)
    assert cosine([0.9, 0.3], [1, 1]) == pytest.approx(0.894427, abs=1e-6)
    for merge, contextual in (("add", [[1, 11], [8, 4]]), ("mean", [[0.5, 5.5], [4, 2]])):
        # Half of four tokens are contextual.
        (chosen,) = VisionDropLlm(keep=4, contextual_ratio=0.5, merge=merge).select(toy(4))
        assert chosen.kept.tolist() == [0, 1, 2, 4]
        torch.testing.assert_close(chosen.apply(STATES), torch.tensor([[2.0, 1], [3, 5], *contextual]))


def plain_merge(attention, keys, states, count, contextual, merge):
    """Return the merged tokens by place, in plain steps."""
    n = len(attention)
    ranked = sorted(range(n), key=lambda i: -attention[i])
    dominant, rest = ranked[: count - contextual], sorted(ranked[count - contextual :])
    out = {i: states[i] for i in dominant}
    step = max(1, len(rest) // max(1, contextual))
    anchors = rest[::step][:contextual]
    members = {a: [] for a in anchors}
    for i in rest:
        if i not in members and anchors:
            members[max(anchors, key=lambda a: cosine(keys[i], keys[a]))].append(i)
    for a, group in members.items():
        if merge == "mean":
            out[a] = sum((states[i] for i in group), states[a]) / (1 + len(group))
        else:
            out[a] = states[a] + sum((states[i] for i in group), torch.zeros_like(states[a])) / max(1, len(group))
    return sorted(out), torch.stack([out[i] for i in sorted(out)])


@pytest.mark.parametrize("merge", ["add", "mean"])
@pytest.mark.parametrize("ratio", [0.0, 0.14, 0.5])
def test_random_prompts_give_the_reference(merge, ratio):
    generator = torch.Generator().manual_seed(3)
    reducer = VisionDropLlm(keep=5, contextual_ratio=ratio, merge=merge)
    sizes, counts = [12, 30, 12, 30, 7, 3], [5, 9, 5, 20, 7, 0]
    attention = [torch.rand(n, generator=generator) for n in sizes]
    keys = [torch.randn(n, 4, generator=generator) for n in sizes]
    chosen = reducer.select(layer_tokens(sizes, counts, {SEEN: attention, LayerKeys(): keys}))
    for span, a, k, count in zip(chosen, attention, keys, counts, strict=True):
        states = torch.randn(len(a), 3, generator=generator)
        if count in (0, len(a)):
            assert span.kept.tolist() == list(range(count))
            assert torch.equal(span.apply(states), states[:count])
            continue
        contextual = max(1, round(ratio * count)) if ratio else 0
        places, expected = plain_merge(a.tolist(), k.tolist(), states, count, contextual, merge)
        assert span.kept.tolist() == places
        torch.testing.assert_close(span.apply(states), expected)


def test_images_get_their_share_and_rank_by_themselves():
    attention = [torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 2]), torch.tensor([0.1, 0.4, 0.3, 0.2])]
    tokens = layer_tokens([12], [6], {SEEN: attention, LayerKeys(): [torch.ones(8, 2), torch.ones(4, 2)]})
    crops = tuple(Crop(torch.arange(*ends), None) for ends in ((0, 8), (8, 12)))
    tokens = replace(tokens, spans=(replace(tokens.spans[0], crops=crops),))
    (chosen,) = VisionDropLlm(keep=3, contextual_ratio=0.0).select(tokens)
    assert chosen.kept.tolist() == [0, 1, 2, 3, 9, 10]
    (merged,) = VisionDropLlm(keep=3, contextual_ratio=0.5).select(tokens)
    assert len(merged) == 6
    assert merged.merge.source.sort().values.tolist() == list(range(12))


@pytest.mark.parametrize(
    ("keep", "counts"),
    [(192, [288, 211, 155, 114]), (128, [192, 141, 103, 76]), (64, [96, 70, 52, 38]), (32, [48, 35, 26, 19])],
)
def test_counts_of_the_specification(keep, counts):
    before, inside = VisionDropAll(keep=keep).stages()
    first = sum(visual_span_budget(before, 576))
    assert [first, *inside.counts(32, [("image", first)])] == counts
    assert inside.boundaries(32) == (8, 16, 24)
    assert sum(counts) / 4 == pytest.approx(keep, abs=0.5)
    assert foveate.core.in_llm.tokens_per_layer(VisionDropAll(keep=keep), 32, 576) == tuple(
        c for c in counts for _ in range(8)
    )


def visual_span_budget(reducer, n):
    (span,) = visual_tokens(reducer, [(0, [(1, n)])]).spans
    return span.budget(reducer.keep)


def test_published_split_into_dominant_and_contextual():
    from foveate.methods.visionzip import contextual_count

    assert [contextual_count(n, 0.14) for n in (35, 26, 19)] == [5, 4, 3]
    assert contextual_count(48, 0.125) == 6


def test_the_factor_between_stages():
    counts = VisionDropLlm(keep=2 / 3).counts(32, [("image", 10**6)])
    factors = [b / a for a, b in zip([10**6, *counts], counts, strict=False)]
    assert factors == pytest.approx([0.7336] * 3, abs=1e-4)


def test_budgets_in_every_form():
    def stages(keep):
        before, inside = VisionDropAll(keep=keep).stages()
        return before.keep, inside.keep

    share, whole = Budget(2 / 3), Budget(1.0)
    assert stages(0.25) == ({"image": Budget(0.375), "video": Budget(0.75)}, {"image": share, "video": Budget(1 / 3)})
    assert stages(1.0)[0] == {"image": whole, "video": whole}
    assert stages(1.0)[1] == {"image": whole, "video": whole}
    assert stages([32, 0.2]) == ((Budget(48), Budget(0.2 * 1.5)), (Budget(32), Budget(0.2 / (0.2 * 1.5))))
    assert stages({"image": 32}) == ({"image": Budget(48)}, {"image": Budget(32)})
    assert stages(Budget(32, per="crop"))[0]["image"] == Budget(48, per="crop")
    assert stages(Budget(32, per="crop"))[1]["image"].value == 32 / 48
    assert hash(VisionDropAll(keep={"image": 32})) == hash(VisionDropAll(keep={"image": 32}))
    with pytest.raises(BudgetError, match="needs a count or a ratio"):
        VisionDropAll(keep=Budget.coverage(0.9))


def test_what_the_first_layers_alone_receive_is_the_least():
    with pytest.raises(
        BudgetError, match="cannot come down to 100 tokens per layer: the first 8 of 32 layers alone rec"
    ):
        VisionDropLlm(keep=100).counts(32, [("image", 576)])


def test_the_encoder_stage_is_visionzip():
    reducer = VisionDropAll(keep=8).stages()[0]
    tokens = visual_tokens(reducer, [(0, [(6, 6)]), (1, [(6, 6), (3, 5)])])
    other = VisionZip(keep=12, contextual_ratio=0.14)
    for one, two in zip(reducer.select(tokens), other.select(tokens), strict=True):
        assert torch.equal(one.kept, two.kept)
        assert torch.equal(one.merge.source, two.merge.source)
        assert torch.equal(one.merge.weight, two.merge.weight)


def test_the_question_does_not_matter():
    net, found = deep_model("llava"), []
    picture = sample(4, "image", seed=5)
    for seed in (1, 2):
        row = {**picture, "ids": picture["ids"] + sample(6, seed=seed)["ids"]}
        with foveate.attach(net, VisionDropAll(keep=16)) as handle, torch.no_grad():
            net(**collate([row]))
        found.append({b: [s.kept.tolist() for s in rows[0]] for b, rows in handle.layers.items()})
    assert found[0] == found[1]
    assert [len(x[0]) for x in found[0].values()] == [18, 13, 9]


def test_positions_of_every_stage_count_what_its_layers_hold(monkeypatch):
    net, seen = deep_model("llava"), []
    rotary = net.get_decoder().rotary_emb
    plain = rotary.forward
    monkeypatch.setattr(rotary, "forward", lambda x, position_ids: seen.append(position_ids) or plain(x, position_ids))
    with foveate.attach(net, VisionDropAll(keep=16)):
        out = net.generate(**collate([sample(3, "image", 4)]), max_new_tokens=3, do_sample=False,
                           return_dict_in_generate=True)  # fmt: skip
    lengths = [3 + n + 4 for n in (24, 18, 13, 9)]
    prefill, decoding = seen[:4], [[int(x) for x in seen[i : i + 4]] for i in (4, 8)]
    assert [x.flatten().tolist() for x in prefill] == [list(range(n)) for n in lengths]
    assert decoding == [[n + step for n in lengths] for step in (0, 1)]
    assert [layer.get_seq_length() for layer in cache_of(out).layers] == [n + 2 for n in lengths]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["as-many-key-heads", "fewer-key-heads"])
def test_the_ranking_is_that_of_the_layer_with_full_maps(heads):
    from foveate.core.rows import Rows

    query, key = torch.randn(1, heads[0], 9, 4), torch.randn(1, heads[1], 9, 4)
    rows = torch.arange(2, 8)[None]
    ((_, got),) = Rows(query, key, 0.5).attention(rows)
    repeated = key.repeat_interleave(heads[0] // heads[1], dim=1)
    logits = query @ repeated.mT * 0.5
    maps = logits.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf).softmax(dim=-1)
    torch.testing.assert_close(got, maps[:, :, 2:8])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"keep": 8, "rows": "half"}, "rows is"),
        ({"keep": 8, "layers": (3, 2)}, "layers of visiondrop_llm ascend"),
        ({"keep": 8, "layers": ()}, "layers of visiondrop_llm ascend"),
        ({"keep": 8, "merge": "sum"}, "merge is"),
        ({"keep": 8, "contextual_ratio": 2.0}, "contextual_ratio"),
    ],
)
def test_impossible_parameters_are_refused(config, message):
    for method in (VisionDropLlm, VisionDropAll):
        with pytest.raises(FoveateError, match=message):
            method(**config)


def test_a_single_stage_keeps_its_share_of_contextual_tokens():
    assert VisionDrop(keep=48).contextual_ratio == VisionDropAll(keep=32).contextual_ratio == 0.14
