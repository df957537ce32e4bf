"""Attaching, detaching, and what is left behind."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from oracle import every_family_in_depth
from transformers import DynamicCache

import foveate
from foveate import Chain, FoveateError
from foveate.core.errors import AttachError, BudgetError, InputError, UnknownNameError
from foveate.engines.transformers.caches import NAME as CACHE
from foveate.methods import FastV, PyramidDrop, Random, SparseVLM, Uniform, VisPruner
from tiny import METHODS, TINIES, collate, deep_model, make, method_id, model, of_each_kind, sample, samples

GREEDY = {"max_new_tokens": 4, "do_sample": False}


def state(net):
    """Everything about a model that an attachment might change."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_backward_hooks", "_buffers")
    modules = {
        name: (type(m), [list(getattr(m, h, {})) for h in hooks], sorted(vars(m))) for name, m in net.named_modules()
    }
    configs = [m.config for m in net.modules() if hasattr(m, "config")]
    values = {name: (x.data_ptr(), x._version, x.requires_grad) for name, x in net.state_dict(keep_vars=True).items()}
    return (
        modules, values, [c._attn_implementation for c in configs], net.config.to_dict(),
        net.generation_config.to_dict(), net.generate.__func__, net.forward.__func__,
    )  # fmt: skip


@every_family_in_depth
@pytest.mark.parametrize("entry", of_each_kind(METHODS), ids=method_id)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_detaching_restores_the_model(family, entry, attention):
    net, inputs = model(family, attention), collate(samples(family))
    plain = net(**inputs).logits
    before = state(net)
    handle = foveate.attach(net, make(entry, 9, family))
    net.generate(**inputs, **GREEDY)
    net(**inputs)
    assert "generate" in vars(net)
    handle.detach()
    assert state(net) == before
    assert "generate" not in vars(net)
    assert torch.equal(net(**inputs).logits, plain)
    handle.detach()
    assert state(net) == before


def test_a_generate_of_the_instance_comes_back():
    net = model("llava")
    original, calls = net.generate, []

    def own(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    net.generate = own
    inputs = collate(samples("llava"))
    with foveate.attach(net, Uniform(keep=9)):
        net.generate(**inputs, **GREEDY)
    assert len(calls) == 1
    assert calls[0]["input_ids"].shape[1] < inputs["input_ids"].shape[1]
    assert vars(net)["generate"] is own


def test_only_one_attachment_at_a_time():
    net = model("llava")
    before = state(net)
    with foveate.attach(net, Uniform(keep=9)), pytest.raises(AttachError, match=r"Uniform\(keep=9\) is attached"):
        foveate.attach(net, VisPruner(keep=9))
    assert state(net) == before
    first = foveate.attach(net, Uniform(keep=9))
    first.detach()
    with foveate.attach(net, VisPruner(keep=9)):
        first.detach()  # no longer its own
        assert "generate" in vars(net)
    assert state(net) == before


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
def test_an_attached_model_is_not_copied(duplicate):
    net = model("llava")
    with foveate.attach(net, Uniform(keep=9)), pytest.raises(AttachError, match="detach it first"):
        duplicate(net)
    duplicate(net)


class FaultError(RuntimeError):
    pass


def test_an_exception_restores_the_model():
    net, inputs = model("llava"), collate(samples("llava"))
    before = state(net)

    def use():
        with foveate.attach(net, VisPruner(keep=9)):
            net.generate(**inputs, **GREEDY)
            raise FaultError

    with pytest.raises(FaultError):
        use()
    assert state(net) == before


@pytest.mark.parametrize("where", ["model.vision_tower.encoder.layers.1", "model.language_model.layers.1", "lm_head"])
def test_an_exception_inside_the_model_leaves_the_attachment_usable(where):
    net, inputs = model("llava"), collate(samples("llava"))
    before = state(net)

    def fail(*_):
        raise FaultError

    with foveate.attach(net, VisPruner(keep=9)):
        expected = net.generate(**inputs, **GREEDY)
        hook = net.get_submodule(where).register_forward_pre_hook(fail)
        with pytest.raises(FaultError):
            net.generate(**inputs, **GREEDY)
        with pytest.raises(FaultError):
            net(**inputs)
        hook.remove()
        assert torch.equal(net.generate(**inputs, **GREEDY), expected)
        assert net(**inputs).logits.shape[1] < inputs["input_ids"].shape[1]
    assert state(net) == before


def test_an_attached_model_can_be_collected():
    net = model("llava")
    handle = foveate.attach(net, Uniform(keep=9))
    net.generate(**collate(samples("llava")), **GREEDY)
    handle.detach()
    del handle
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("reducer", [Uniform(keep=9), FastV(keep=9, layer=1)], ids=["before", "inside"])
def test_caches_live_no_longer_than_their_owner(reducer):
    net, inputs = deep_model("llava"), collate(samples("llava"))
    with foveate.attach(net, reducer) as handle:
        cache = DynamicCache()
        net.generate(**inputs, **GREEDY, **{CACHE: cache})
        gone = weakref.ref(cache)
        del cache
        gc.collect()
        assert gone() is None
        assert len(handle.selections) == 3


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize(
    "reducer", [Uniform(keep=9), FastV(keep=9, layer=1), PyramidDrop(keep=0.5), SparseVLM(keep=24)],
    ids=lambda r: r.name,
)  # fmt: skip
def test_a_cache_goes_on_as_a_copy_and_with_another_handle(reducer, positions):
    net, inputs = deep_model("llava"), collate(samples("llava"))
    rest = torch.arange(15).reshape(3, 5) + 20
    with foveate.attach(net, reducer, positions=positions):
        cache = DynamicCache()
        one = net.generate(**inputs, **GREEDY, **{CACHE: cache})
        later = copy.deepcopy(cache)
        again = copy.deepcopy(cache)
        turn = {"input_ids": torch.cat([one, rest], dim=1)}
        turn["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 9), value=1)
        expected = net.generate(**turn, **GREEDY, **{CACHE: cache})
        assert torch.equal(net.generate(**turn, **GREEDY, **{CACHE: again}), expected)
    with foveate.attach(net, reducer, positions=positions):
        assert torch.equal(net.generate(**turn, **GREEDY, **{CACHE: later}), expected)


def test_a_cache_that_was_cut_inside_the_llm_needs_a_method_inside_it():
    net, inputs, cache = deep_model("llava"), collate(samples("llava")), DynamicCache()
    with foveate.attach(net, FastV(keep=9, layer=1)):
        out = net.generate(**inputs, **GREEDY, **{CACHE: cache})
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
    with foveate.attach(net, Uniform(keep=9)), pytest.raises(InputError, match="attach the method inside the LLM"):
        net.generate(input_ids=out, attention_mask=mask, **GREEDY, **{CACHE: cache})


@pytest.mark.parametrize("reducer", [Uniform(keep=9), FastV(keep=5, layer=2)], ids=["before", "inside"])
def test_a_cache_that_was_emptied_is_as_good_as_new(reducer):
    net, inputs, cache = deep_model("llava"), collate(samples("llava")), DynamicCache()
    with foveate.attach(net, FastV(keep=9, layer=1)):
        net.generate(**inputs, **GREEDY, **{CACHE: cache})
    cache.reset()
    with foveate.attach(net, reducer):
        expected = net.generate(**inputs, **GREEDY)
        assert torch.equal(net.generate(**inputs, **GREEDY, **{CACHE: cache}), expected)


@every_family_in_depth
@pytest.mark.parametrize("entry", of_each_kind(METHODS), ids=method_id)
@pytest.mark.parametrize(
    "positions", [None, *(pytest.param(p, marks=pytest.mark.slow) for p in ("original", "compact"))]
)
def test_reduce_equals_attach(family, entry, positions):
    if positions not in (None, *TINIES[family].positions):
        with pytest.raises(InputError, match="use positions='original'"):
            foveate.attach(model(family), make(entry, 9), positions=positions)
        return
    net, inputs = model(family), collate(samples(family))
    length = inputs["input_ids"].shape[1]
    net(**inputs)  # transformers leaves hooks of its own behind when a tower first gives its hidden states
    before, given = state(net), dict(inputs)
    reducer = make(entry, 9, family)
    reduced = foveate.reduce(net, inputs, reducer, positions=positions)
    assert state(net) == before
    assert inputs == given
    assert not {"pixel_values", "pixel_values_videos", "image_sizes"} & set(reduced)
    width = reduced["input_ids"].shape[1]
    assert reduced["attention_mask"].shape[1] == width < length
    numbered = positions or (reducer.positions if "compact" in TINIES[family].positions else "original")
    assert ("position_ids" in reduced) == (numbered == "original")
    pure = net.generate(**reduced, **GREEDY)
    logits = net(**reduced).logits
    with foveate.attach(net, reducer, positions=positions) as handle:
        out = net.generate(**inputs, **GREEDY)
        assert torch.equal(net(**inputs).logits, logits)
    assert torch.equal(out[:, length:], pure[:, width:])
    flat = [span.kept.tolist() for row in handle.selections for span in row]
    assert flat == [span.kept.tolist() for span in reduced.selection]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda net, _: foveate.attach(net, "vispruna", keep=9), UnknownNameError, "vispruner"),
        (lambda net, _: foveate.attach(net, "vispruner"), FoveateError, "lacks keep"),
        (lambda net, _: foveate.attach(net, "vispruner", keep=0), BudgetError, "at least 1"),
        (lambda net, _: foveate.attach(net, "random", keep=9, positions="new"), InputError, "'original' or 'compact'"),
        (lambda net, _: foveate.attach(net, "random", keep=9, separators="all"), InputError, "'nonempty'"),
        (lambda net, _: foveate.attach(net, "downsample", keep=9, separators="keep"), InputError, "'drop'"),
        (lambda net, x: foveate.reduce(net, {**x, "input_ids": None}, "random", keep=9), InputError, "input_ids"),
        (
            lambda net, x: foveate.reduce(net, {**x, "attention_mask": x["input_ids"][:, None]}, "random", keep=9),
            InputError,
            "pass the 2-D mask",
        ),
        (lambda net, x: foveate.reduce(net, {**x, "pixel_values": x["pixel_values"][:2]}, "random", keep=9), InputError,
         "hold 256 image placeholder tokens, but the 2 image"),
        (lambda net, x: foveate.reduce(net, x, "random", keep=[9]), BudgetError, "one budget per image"),
        (lambda net, x: foveate.reduce(net, x, "random", keep={"video": 9}), BudgetError, "no budget for 'image'"),
        (lambda net, x: foveate.reduce(net, foveate.reduce(net, x, "random", keep=9), "uniform", keep=4), InputError,
         "as one Chain"),
    ],
)  # fmt: skip
def test_errors_help_and_leave_no_trace(call, kind, message):
    net, inputs = model("llava"), collate(samples("llava"))
    before = state(net)
    with pytest.raises(kind, match=message):
        call(net, inputs)
    assert state(net) == before


def test_selections_are_those_of_the_last_call_with_images():
    net, inputs = model("llava"), collate(samples("llava"))
    with foveate.attach(net, Chain(Uniform(keep=30), Random(keep=9))) as handle:
        assert handle.selections == []
        net.generate(**inputs, **GREEDY)
        assert [len(row) for row in handle.selections] == [1, 2, 1]
        assert all(s.sample == i and len(s) == 9 for i, row in enumerate(handle.selections) for s in row)
        net.generate(**collate([sample(4)]), **GREEDY)
        assert [len(row) for row in handle.selections] == [1, 2, 1]
        net(**collate([sample(4, "image", 2)]))
        assert [len(row) for row in handle.selections] == [1]


@torch.no_grad()
def test_what_a_call_that_failed_was_to_show_is_forgotten():
    net, text = deep_model("llava"), collate([sample(9, seed=7)])
    expected = net(**text).logits
    with foveate.attach(net, FastV(keep=9, layer=1)):
        with pytest.raises(ValueError, match="no_such_option"):
            net.generate(**collate([sample(4, "image", 2)]), no_such_option=1)
        assert torch.equal(net(**text).logits, expected)


@torch.no_grad()
def test_a_pass_that_failed_is_over():
    net, inputs = deep_model("llava"), collate(samples("llava"))
    decoder = net.get_decoder()
    states = torch.randn(1, 9, decoder.config.hidden_size)
    expected = decoder(inputs_embeds=states, use_cache=False).last_hidden_state

    def fail(*_):
        raise FaultError

    with foveate.attach(net, FastV(keep=9, layer=1)) as handle:
        net(**inputs)
        hook = net.lm_head.register_forward_pre_hook(fail)
        with pytest.raises(FaultError):
            net(**collate([sample(4, "image", 2)]))
        hook.remove()
        assert handle.selections == []
        assert torch.equal(decoder(inputs_embeds=states, use_cache=False).last_hidden_state, expected)


def test_text_alone_leaves_the_results_of_a_chain():
    net = deep_model("llava")
    with foveate.attach(net, Chain(Uniform(keep=30), FastV(keep=9, layer=1))) as handle:
        net.generate(**collate(samples("llava")), **GREEDY)
        before = handle.received
        net.generate(**collate([sample(4)]), **GREEDY)
        assert [len(row) for row in handle.selections] == [1, 2, 1]
        assert handle.received == before


def test_a_least_length_below_what_was_dropped_asks_for_nothing():
    net, inputs = model("llava"), collate(samples("llava"))
    with foveate.attach(net, Uniform(keep=9)):
        expected = net.generate(**inputs, **GREEDY)
        assert torch.equal(net.generate(**inputs, **GREEDY, min_length=5), expected)


def test_threads_share_an_attached_model():
    net = model("llava")
    prompts = [collate([sample(3 + i, "image", 4, seed=i)]) for i in range(3)]
    with foveate.attach(net, VisPruner(keep=9)):
        expected = [net.generate(**x, **GREEDY) for x in prompts]
        faults, barrier = [], threading.Barrier(3)

        def work(i):
            for _ in range(5):
                barrier.wait(timeout=60)
                if not torch.equal(net.generate(**prompts[i], **GREEDY), expected[i]):
                    faults.append(i)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not faults
    assert not barrier.broken
    assert net.model.vision_tower.config._attn_implementation == "sdpa"
