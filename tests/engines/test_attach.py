"""Attaching, detaching, and what is left behind."""

import gc
import threading

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

import foveate
from foveate import Budget, Chain, FoveateError, Reducer
from foveate.errors import AttachError, BudgetError, InputError, UnknownNameError, UnsupportedModelError
from foveate.families import FAMILIES as FAMILIES_BY_NAME
from foveate.families import family_of
from foveate.methods import Downsample, FasterVLM, Pool, Random, Uniform, VisPruner
from tiny import FAMILIES, IMAGE, METHODS, collate, make, method_id, model, sample, samples

every_family = pytest.mark.parametrize("family", FAMILIES)
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


@every_family
@pytest.mark.parametrize("entry", METHODS, ids=method_id)
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
    import weakref

    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None


def test_caches_are_forgotten_with_their_owner():
    net, inputs = model("llava"), collate(samples("llava"))
    with foveate.attach(net, Uniform(keep=9)) as handle:
        cache = DynamicCache()
        net.generate(**inputs, **GREEDY, past_key_values=cache)
        assert len(handle._caches) == 1
        del cache
        gc.collect()
        assert len(handle._caches) == 0


@every_family
@pytest.mark.parametrize("entry", METHODS, ids=method_id)
@pytest.mark.parametrize("positions", [None, "original", "compact"])
def test_reduce_equals_attach(family, entry, positions):
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
    assert ("position_ids" in reduced) == ((positions or reducer.positions) == "original")
    pure = net.generate(**reduced, **GREEDY)
    logits = net(**reduced).logits
    with foveate.attach(net, reducer, positions=positions) as handle:
        out = net.generate(**inputs, **GREEDY)
        assert torch.equal(net(**inputs).logits, logits)
    assert torch.equal(out[:, length:], pure[:, width:])
    flat = [span.kept.tolist() for row in handle.selections for span in row]
    assert flat == [span.kept.tolist() for span in reduced.selection]


def test_gradients_reach_projector_and_tower():
    net, inputs = model("llava"), collate(samples("llava"), labels=True)
    kept = []
    for make_inputs in (lambda: foveate.reduce(net, inputs, VisPruner(keep=9)), None):
        net.zero_grad()
        if make_inputs is not None:
            net(**make_inputs()).loss.backward()
        else:
            with foveate.attach(net, VisPruner(keep=9)):
                net(**inputs).loss.backward()
        wanted = [
            net.model.multi_modal_projector.linear_1.weight,
            net.model.vision_tower.encoder.layers[0].mlp.fc1.weight,
        ]
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in wanted)
        kept.append([p.grad.clone() for p in wanted])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_only_kept_tokens_get_gradients():
    net, inputs = model("llava"), collate([sample(3, "image", 5)], labels=True)
    seen = {}
    hook = net.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: seen.update(rows=len(args[0])))
    net(**foveate.reduce(net, inputs, Uniform(keep=9))).loss.backward()
    hook.remove()
    assert seen["rows"] == 9  # dropped tokens are not even projected


def test_by_name_by_file_and_by_reducer(tmp_path):
    net, inputs = model("llava"), collate(samples("llava"))
    VisPruner(keep=9, step=4).save(tmp_path / "reducer.json")
    expected = foveate.reduce(net, inputs, VisPruner(keep=9, step=4))
    for method, config in [("vispruner", {"keep": 9, "step": 4}), (tmp_path / "reducer.json", {}),
                           (VisPruner(keep=9), {"step": 4})]:  # fmt: skip
        got = foveate.reduce(net, inputs, method, **config)
        assert torch.equal(got["input_ids"], expected["input_ids"])
        assert [s.kept.tolist() for s in got.selection] == [s.kept.tolist() for s in expected.selection]
        with foveate.attach(net, method, **config) as handle:
            assert handle.reducer == VisPruner(keep=9, step=4)


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
    ],
)  # fmt: skip
def test_errors_help_and_leave_no_trace(call, kind, message):
    net, inputs = model("llava"), collate(samples("llava"))
    before = state(net)
    with pytest.raises(kind, match=message):
        call(net, inputs)
    assert state(net) == before


def test_other_models_are_refused():
    net = LlamaForCausalLM(model("llava").config.text_config)
    with pytest.raises(UnsupportedModelError, match=r"'llama'.*there are: llava"):
        foveate.attach(net, "random", keep=9)
    with pytest.raises(UnsupportedModelError, match="LlavaModel has no language-model head"):
        foveate.attach(model("llava").model, "random", keep=9)
    with pytest.raises(UnsupportedModelError, match="there are: llava"):
        foveate.reduce(torch.nn.Linear(1, 1), {}, "random", keep=9)


def test_a_method_of_another_stage_is_refused():
    class Inner(Random):
        stage, name = "in_llm", "inner"

    with pytest.raises(UnsupportedModelError, match="'in_llm'"):
        foveate.attach(model("llava"), Inner(keep=9))


def test_default_positions_are_those_of_the_paper():
    net, inputs = model("llava"), collate(samples("llava"))

    class Fixed(Uniform):
        positions = "original"

    assert "position_ids" not in foveate.reduce(net, inputs, Uniform(keep=9))
    assert "position_ids" in foveate.reduce(net, inputs, Fixed(keep=9))
    assert "position_ids" not in foveate.reduce(net, inputs, Fixed(keep=9), positions="compact")


def kept_separators(net, inputs, method, separators):
    """Return, per span, the kept positions, the kept separators, and the span."""
    spans = family_of(net).spans(net, inputs)
    reduced = foveate.reduce(net, inputs, method, separators=separators)
    results = []
    for span, chosen in zip(spans, reduced.selection, strict=True):
        chosen.check()
        results.append((set(chosen.kept.tolist()), set(chosen.kept.tolist()) & set(span.separators().tolist()), span))
    return results


@pytest.mark.parametrize("family", ["llava_next", "video_llava"])
@pytest.mark.parametrize("reducer", [Uniform(keep=9), VisPruner(keep=9), Pool(keep=9)], ids=lambda r: r.name)
def test_separators_drop_and_keep(family, reducer):
    net, inputs = model(family), collate(samples(family))
    for (dropped, none, span), (kept, all_of_them, _) in zip(
        kept_separators(net, inputs, reducer, "drop"), kept_separators(net, inputs, reducer, "keep"), strict=True
    ):
        assert none == set()
        assert all_of_them == set(span.separators().tolist())
        assert dropped | all_of_them == kept
        assert len(dropped) == 9
        assert (len(all_of_them) > 0) == (family == "llava_next" or span.kind == "video")


@pytest.mark.parametrize("reducer", [FasterVLM(keep=Budget(6, per="joint")), Pool(keep=6)], ids=lambda r: r.name)
def test_nonempty_newlines_close_a_row_with_a_token(reducer):
    net, inputs = model("llava_next"), collate(samples("llava_next"))
    some = 0
    for kept, newlines, span in kept_separators(net, inputs, reducer, "nonempty"):
        everything = span.separators().tolist()
        width = everything[1] - everything[0] - 1
        expected = {n for n in everything if kept & set(range(n - width, n))}
        assert newlines == expected
        some += 0 < len(newlines) < len(everything)
    assert some


def test_nonempty_cls_tokens_open_a_frame_with_a_token():
    class Last(Reducer):
        """Keeps three tokens of the last frame."""

        name = "last"

        def select(self, tokens):
            chosen = list(Uniform(keep=3).select(tokens))
            for i, span in enumerate(tokens.spans):
                object.__setattr__(chosen[i], "kept", span.crops[-1].index[:3])
            return foveate.Selection(tuple(chosen))

    net, inputs = model("video_llava"), collate(samples("video_llava"))
    for kept, separators, span in kept_separators(net, inputs, Last(keep=3), "nonempty"):
        last = span.crops[-1].index
        assert kept == {*last[:3].tolist(), *separators}
        assert separators == ({int(last[0]) - 1} if span.kind == "video" else set())


@pytest.mark.parametrize("family", ["llava_next", "video_llava"])
@pytest.mark.parametrize("separators", ["drop", "keep", "nonempty"])
@pytest.mark.parametrize("reducer", [Random(keep=9), Pool(keep=9)], ids=lambda r: r.name)
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_separators_equal_the_oracle(family, separators, reducer, positions):
    from oracle import rebuilt

    net, inputs = model(family), collate(samples(family)[:2] if family == "llava_next" else samples(family)[::2])
    reduced = foveate.reduce(net, inputs, reducer, separators=separators, positions=positions)
    with torch.no_grad():
        logits = net(**reduced).logits
    expected = rebuilt(net, inputs, reduced.selection.by_prompt(2), positions)
    for got, row in zip(logits, expected, strict=True):
        torch.testing.assert_close(got[-len(row) :], row, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [-1, -2, -3, [-3, -1]], ids=str)
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_feature_layer_and_strategy_of_the_call(layer, strategy):
    """Chosen by configuration or by the call, with the ``[CLS]`` token in the span or not."""
    net = model("llava")
    if isinstance(layer, list):
        wide = torch.nn.Linear(64, 32)
        net.model.multi_modal_projector.linear_1 = wide
    inputs = collate([sample(3, "image", 5)])
    if strategy == "full":
        row = sample(3, "image", 5)
        row["ids"].insert(3, IMAGE)
        inputs = collate([row])
    options = {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy}
    reduced = foveate.reduce(net, {**inputs, **options}, VisPruner(keep=9), separators="keep")
    (chosen,) = reduced.selection
    assert len(chosen) == 9 + (strategy == "full")
    (features,) = net.get_image_features(inputs["pixel_values"], **options).pooler_output
    (embeds,) = reduced["mm_encoder_outputs"]["image"].pooler_output
    torch.testing.assert_close(embeds, features[chosen.kept], atol=1e-5, rtol=1e-5)
    assert net(**reduced).logits.shape[1] == inputs["input_ids"].shape[1] - chosen.length + len(chosen)


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


@pytest.mark.parametrize("family", [f for f in FAMILIES if FAMILIES_BY_NAME[f].resizes])
def test_downsample_runs_everywhere(family):
    net, inputs = model(family), collate(samples(family))
    for keep in (9, Budget(0.25, per="crop")):
        reduced = foveate.reduce(net, inputs, Downsample(keep=keep))
        spans = family_of(net).spans(net, inputs)
        for span, chosen in zip(spans, reduced.selection, strict=True):
            assert 0 < len(chosen) <= sum(span.budget(keep))
        assert net(**reduced).logits.isfinite().all()
