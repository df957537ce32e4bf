"""Methods in stages and chains, and what a model with a method inside its LLM refuses."""

from __future__ import annotations

import pytest
import torch
from inside import (
    TOKENS,
    answer_of,
    close,
    every_family_in_depth,
    generate,
    kept,
    make,
)
from layered import layered_answer
from transformers import DynamicCache, StaticCache

import foveate
from foveate import Budget, Chain, FoveateError
from foveate.core.errors import BudgetError, UnsupportedModelError
from foveate.core.in_llm import tokens_in_layers
from foveate.engines.transformers.caches import NAME as CACHE
from foveate.engines.transformers.caches import cache_of
from foveate.methods import FastV, PyramidDrop, ToDREExit, TopV, VisPruner
from foveate.registry import get_method
from tiny import (
    STAGED,
    VISUALS,
    collate,
    deep_model,
    method_id,
    model,
    sample,
    samples,
)


@every_family_in_depth
@pytest.mark.parametrize("inside", STAGED, ids=method_id)
def test_methods_in_stages_alone_in_batches_and_with_a_whole_budget(family, inside):
    name, config = inside
    net, rows, reducer = deep_model(family), samples(family), make(inside)
    for side in ("left", "right"):
        with foveate.attach(net, reducer) as handle, torch.no_grad():
            together, selections = net(**collate(rows, side)).logits, handle.selections
            assert handle.layers or reducer.stages()[1].adaptive
            assert all(len(span) < span.length for row in selections for span in row)
            for i, row in enumerate(rows):
                single = net(**collate([row])).logits[0]
                assert kept(handle.selections) == kept(selections[i : i + 1])
                own = together[i, : len(single)] if side == "right" else together[i, -len(single) :]
                close(own, single)
    if reducer.stages()[1].adaptive:
        return
    plain = generate(net, collate(rows), max_new_tokens=3)
    with foveate.attach(net, get_method(name)(**{**config, "keep": 1.0})):
        out = generate(net, collate(rows), max_new_tokens=3)
    assert torch.equal(torch.stack(out.logits), torch.stack(plain.logits))


def test_a_method_inside_acts_where_the_one_before_it_keeps_everything():
    net, inputs = deep_model("llava"), collate(samples("llava"))
    with foveate.attach(net, FastV(keep=9, layer=2)) as handle:
        expected, alone = generate(net, inputs), kept(handle.selections)
    with foveate.attach(net, Chain(VisPruner(keep=1.0), FastV(keep=9, layer=2))) as handle:
        out = generate(net, inputs)
        assert kept(handle.selections) == alone
    assert torch.equal(torch.stack(out.logits), torch.stack(expected.logits))


def test_hidden_states_are_those_of_the_tokens_that_are_left():
    net, inputs = deep_model("llava"), collate([sample(4, "image", 5)])
    plain = net(**inputs, output_hidden_states=True).hidden_states
    with foveate.attach(net, FastV(keep=9, layer=2)):
        out = net(**inputs, output_hidden_states=True).hidden_states
    assert [x.shape[1] for x in out] == [73, 73, 73, 18, 73]  # the input, the outputs of the layers, the last normed
    assert all(torch.equal(a, b) for a, b in zip(out[:3], plain[:3], strict=True))


def test_chain_of_before_and_inside():
    net, inputs = deep_model("llava"), collate(samples("llava"))
    chain = Chain(VisPruner(keep=20), FastV(keep=0.35, layer=2))
    with foveate.attach(net, chain) as handle:
        out = generate(net, inputs)
        final = handle.selections
    reduced = foveate.reduce(net, inputs, VisPruner(keep=20))
    with foveate.attach(net, FastV(keep=0.35, layer=2)):
        two_steps = generate(net, dict(reduced))
    close(torch.stack(out.logits, 1), torch.stack(two_steps.logits, 1))
    sizes = [layer.get_seq_length() for layer in cache_of(out).layers]
    width = reduced["input_ids"].shape[1]
    assert sizes[:2] == [width + TOKENS - 1] * 2
    assert sizes[2] == sizes[3] < width
    for row, before in zip(final, reduced.selection.by_prompt(3), strict=True):
        assert [len(s) for s in row] != []
        assert sum(len(s) for s in row) == 7 * len(row)
        for span, whole in zip(row, before, strict=True):
            assert set(span.kept.tolist()) <= set(whole.kept.tolist())


def test_beams_and_a_second_turn_behind_a_chain():
    net, inputs = deep_model("llava"), collate(samples("llava"))
    chain = Chain(VisPruner(keep=20), FastV(keep=7, layer=2))
    cache = DynamicCache()
    with foveate.attach(net, chain) as handle:
        beams = generate(net, inputs, num_beams=2, max_new_tokens=4)
        assert len(handle.selections) == 3
        one = generate(net, inputs, max_new_tokens=4, **{CACHE: cache})
        rows = [{**row, "ids": row["ids"] + answer + [5, 6, 7]}
                for row, answer in zip(samples("llava"), answer_of(one, inputs).tolist(), strict=True)]  # fmt: skip
        whole = collate(rows)
        two = generate(net, {k: whole[k] for k in ("input_ids", "attention_mask")}, **{CACHE: cache})
        # The same without a cache: the chain sees the same images, and FastV another end of the prompt.
    assert beams.sequences.shape == (3, inputs["input_ids"].shape[1] + 4)
    assert torch.equal(two.sequences[:, : whole["input_ids"].shape[1]], whole["input_ids"])
    assert torch.isfinite(torch.stack(two.logits)).all()


def test_detaching_restores_the_model_exactly():
    net = deep_model("llava")
    before = {name: dict(vars(module)) for name, module in net.named_modules()}
    with foveate.attach(net, FastV(keep=9, layer=2)):
        pass
    for name, module in net.named_modules():
        now = vars(module)
        assert now.keys() == before[name].keys()
        assert now.get("config") is before[name].get("config")
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert "generate" not in vars(net)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "static"}, "DynamicCache"),
        ({"cache_implementation": "offloaded_static"}, "DynamicCache"),
        ({"prefill_chunk_size": 8}, "prefill_chunk_size"),
        ({"prompt_lookup_num_tokens": 3}, "takes tokens back"),
        ({"assistant_model": object()}, "takes tokens back"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_what_generation_cannot_go_along_with(options, message):
    net, inputs = deep_model("llava"), collate(samples("llava"))
    with foveate.attach(net, FastV(keep=9)), pytest.raises(FoveateError, match=message):
        net.generate(**inputs, max_new_tokens=2, **options)


def test_a_static_cache_is_refused():
    net, inputs = deep_model("llava"), collate(samples("llava"))
    cache = StaticCache(config=net.config.get_text_config(), max_cache_len=200)
    with foveate.attach(net, FastV(keep=9)), pytest.raises(FoveateError, match="DynamicCache"):
        net(**inputs, **{CACHE: cache})


def test_gradient_checkpointing_is_refused():
    net, inputs = deep_model("llava"), collate(samples("llava"))
    net.gradient_checkpointing_enable()
    net.train()
    with foveate.attach(net, FastV(keep=9)), pytest.raises(FoveateError, match="gradient checkpointing"):
        net(**inputs)
    net.eval()


@pytest.mark.parametrize("family", ["lfm2_vl", "qwen3_5"])
def test_recurrent_layers_are_refused(family):
    with pytest.raises(FoveateError, match="attention in every layer of the LLM"):
        foveate.attach(model(family), FastV(keep=9, layer=1))
    net = model(family)
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_layers_that_the_model_lacks():
    with pytest.raises(FoveateError, match="layers 0 to 1"):
        foveate.attach(model("llava"), FastV(keep=9, layer=2))


def test_reduce_is_no_way_to_run_it():
    net = deep_model("llava")
    with pytest.raises(FoveateError, match=r"foveate\.attach"):
        foveate.reduce(net, collate(samples("llava")), FastV(keep=9))


def test_chains_put_methods_inside_the_llm_last():
    with pytest.raises(FoveateError, match="come last"):
        Chain(FastV(keep=9), VisPruner(keep=5))
    with pytest.raises(FoveateError, match="ascending"):
        foveate.attach(deep_model("llava"), Chain(FastV(keep=9, layer=2), FastV(keep=5, layer=1)))
    net, inputs = deep_model("llava"), collate(samples("llava"))
    with foveate.attach(net, Chain(FastV(keep=9, layer=1), FastV(keep=5, layer=3))) as handle:
        out = generate(net, inputs)
    assert list(handle.layers) == [1, 3]
    close(torch.stack(out.logits, 1), layered_answer(net, inputs, handle.layers, answer_of(out, inputs), "original"))


def test_an_engine_of_vllm_is_refused_with_the_alternative():
    engine = type("LLM", (), {"__module__": "vllm.entrypoints.llm"})()
    with pytest.raises(FoveateError, match=r"inside the LLM.*use a method that acts before the LLM: .*vispruner"):
        foveate.attach(engine, FastV(keep=9))
    with pytest.raises(FoveateError, match="models of transformers"):
        foveate.attach(engine, VisPruner(keep=9))


def test_each_method_of_a_chain_counts_from_what_the_one_before_it_left():
    net, inputs = deep_model("llava"), collate([sample(4, "image", 5)])
    halves = Chain(FastV(keep=0.5, layer=1), FastV(keep=0.5, layer=2), PyramidDrop(keep=0.5, layers=(3,)))
    with foveate.attach(net, halves, positions="original") as handle:
        generate(net, inputs)
        assert handle.received == [[64, 32, 16, 8]]
        assert tokens_in_layers(halves.stages(), 4, [("image", 64)]) == (64, 32, 16, 8)
    assert tokens_in_layers((FastV(keep=0.5, layer=1), FastV(keep=3, layer=2)), 3, [("image", 8), ("video", 4)]) == (
        12,
        6,
        5,
    )
    with foveate.attach(
        net, Chain(FastV(keep=0.5, layer=1), ToDREExit(tau=0.0, layer=2), FastV(keep=0.25, layer=3))
    ) as handle:
        generate(net, inputs)
        assert handle.received[0][-1] <= 8


def test_reduced_inputs_keep_their_images_apart():
    net, inputs = deep_model("llava"), collate([sample(4, "image", 5, "image", 3), sample(2, "image", 1)])
    chain = Chain(VisPruner(keep=20), FastV(keep=7, layer=2))
    with foveate.attach(net, chain) as handle:
        net(**inputs)
        expected, counts = kept(handle.selections), handle.received
    reduced = foveate.reduce(net, inputs, chain.reducers[0])
    with foveate.attach(net, chain.reducers[1]) as handle:
        net(**reduced)
        assert handle.received == counts == [[40, 40, 14, 14], [20, 20, 7, 7]]
        inside = kept(handle.selections)
    first = reduced.selection.by_prompt(2)
    for row, chosen, whole in zip(first, inside, expected, strict=True):
        assert [span.kept[torch.tensor(own)].tolist() for span, own in zip(row, chosen, strict=True)] == whole


@pytest.mark.parametrize(
    ("reducer", "message"),
    [
        (FastV(keep=Budget(5, per="crop"), layer=1), "not per crop"),
        (FastV(keep=10, equivalent=32, layer=1), "contradict each other, as the latter leaves 21 of 64"),
        (PyramidDrop(keep=0.5, equivalent=20, layers=(1, 2, 3)), "contradict each other"),
        (TopV(keep=5, layer=2, recovery=0), "keeps all 6 separators"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(reducer, message):
    family = "llava_next" if isinstance(reducer, TopV) else "llava"
    net, inputs = deep_model(family), collate([sample(4, VISUALS[family][0], 5)])
    with foveate.attach(net, reducer), pytest.raises(BudgetError, match=message):
        net(**inputs)


def test_rows_that_see_a_token_are_not_told_from_others_where_tokens_see_each_other():
    with pytest.raises(UnsupportedModelError, match="use rows='all'"):
        foveate.attach(deep_model("paligemma"), "visiondrop_all", keep=9, rows="visible")
    with pytest.raises(BudgetError, match="leave one of them out"):
        get_method("sparsevlm")(keep=9, equivalent=9)


@pytest.mark.parametrize("keep", [9, 1])
@torch.no_grad()
def test_the_last_token_of_a_prompt_stays_even_of_an_image(keep):
    net = deep_model("llava")
    with foveate.attach(net, FastV(keep=keep, layer=1)) as handle:
        net(**collate([sample(4, "image")]))
    (span,) = handle.selections[0]
    assert len(span) == keep
    assert int(span.kept[-1]) == span.length - 1
