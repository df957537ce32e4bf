"""A bias on attention to kept tokens: equal to the plain model with a mask of numbers, however the model is run."""

import math

import inside
import pytest
import torch
from layered import layered_answer
from oracle import answer_of, close, embeddings, every_family_in_depth, generate
from test_packing import packed
from test_turns import joined
from torch.nn.functional import normalize, pad
from transformers import DynamicCache

import foveate
from foveate import Chain
from foveate.core.errors import InputError, UnsupportedModelError
from foveate.engines.transformers.bias import hooks
from foveate.engines.transformers.bias.planes import Bias
from foveate.engines.transformers.bias.routes import takes_mask
from foveate.engines.transformers.caches import NAME as CACHE
from foveate.families import family_of
from foveate.methods import CDPruner, FastV, PyramidDrop, Random, Uniform, VisPruner
from tiny import TINIES, VISUALS, collate, deep_model, embedded_rows, model, sample, samples

STRENGTH = 0.7


def planes(net, inputs, stages, strength=STRENGTH):
    """Return by layer the bias ``[B, L]`` of the columns of full prompts, worked out token by token.

    `stages` says what is left of each span in front of which layer. What is dropped before the LLM counts with its
    crop, what is dropped inside it with its image.
    """
    embeds, spans = embeddings(net, inputs), family_of(net).spans(net, inputs)
    embeds = normalize((embeds if embeds.dim() == 3 else embeds[:, :, 0]).float(), dim=-1)
    counts = {(s.sample, int(c)): 1.0 for s in spans for c in s.columns}
    ends = [int(mask.nonzero().max()) for mask in inputs["attention_mask"]]
    found = {}
    for layer, selections in stages:
        chosen, kept = iter([c for row in selections for c in row]), {}
        for span in spans:
            kept[id(span)] = {int(span.columns[i]) for i in next(chosen).kept.tolist()}
        groups = []
        for row, end in enumerate(ends):
            own = [s for s in spans if s.sample == row]
            parts = [[int(s.columns[i]) for i in c.index] for s in own for c in s.crops] if layer == 0 else None
            if parts is None:
                parts = [[c for c in s.columns.tolist() if (row, c) in counts and c != end] for s in own]
            left = set().union(*(kept[id(s)] for s in own)) if own else set()
            if layer and any(not left & {*part} for part in parts):
                parts = [[column for part in parts for column in part]]
            groups += [(row, part, [c for c in part if c in left]) for part in parts]
        plane, now = torch.zeros(inputs["input_ids"].shape), {}
        for row, part, left in groups:
            own = {c: counts[row, c] for c in left}
            for column in {*part} - {*left}:
                home = left[int((embeds[row, left] @ embeds[row, column]).argmax())]
                own[home] += counts[row, column]
            total = sum(counts[row, c] for c in part)
            for column, n in own.items():
                plane[row, column] = strength * min(math.log(n), 1.5 * math.log(total / len(left)))
                now[row, column] = n
        if layer == 0:
            counts = now
        found[layer] = plane
    return found


def stages_of(handle):
    """Return what was left before the LLM, if something was dropped there, and in front of its layers."""
    before = handle._results.last._before() if handle.settings.before is not None else []
    return [(0, before)] * bool(before) + sorted(handle.layers.items())


def expected(net, inputs, stages, answer, raised):
    """Return the logits of an answer from the plain model, whose masks hold numbers."""
    raised = {layer: pad(plane, (0, answer.shape[1])) for layer, plane in raised.items()}
    return layered_answer(net, inputs, dict(stages), answer, "original", raised)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@every_family_in_depth
def test_bias_equals_a_mask_of_numbers(family, attention):
    if not TINIES[family].masks:
        pytest.skip("this language model takes no 4-D mask")
    net, inputs = model(family, attention), collate(samples(family))
    with foveate.attach(net, Random(keep=9, seed=2), positions="original", rectify=STRENGTH) as handle:
        out = generate(net, inputs)
        stages = stages_of(handle)
    raised = planes(net, inputs, stages)
    assert raised[0].max() > 0.5
    close(torch.stack(out.logits, 1), expected(net, inputs, stages, answer_of(out, inputs), raised))


INSIDE = [
    FastV(layer=2, keep=5),
    Chain(VisPruner(keep=11), FastV(layer=2, keep=5)),
    PyramidDrop(keep=0.6),
    Chain(Random(keep=12, seed=2), PyramidDrop(keep=0.6)),
]


@pytest.mark.parametrize("method", INSIDE, ids=lambda m: "-".join(part.name for part in m.stages()))
@inside.every_family_in_depth
def test_counts_from_what_is_left_at_each_cut(family, method):
    if lacking := foveate.families.all_families()[family].lacks(method):
        pytest.skip(f"needs {lacking}")
    net, inputs = deep_model(family), collate(samples(family))
    with foveate.attach(net, method, positions="original", rectify=STRENGTH) as handle:
        out = generate(net, inputs)
        stages = stages_of(handle)
    raised = planes(net, inputs, stages)
    assert all(plane.max() > 0.1 for plane in raised.values())
    close(torch.stack(out.logits, 1), expected(net, inputs, stages, answer_of(out, inputs), raised))


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "wider-heads"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [slice(1, 2), slice(None)], ids=["alone", "batch"])
@every_family_in_depth
def test_both_routes_come_to_the_same(family, batch, attention, masked, monkeypatch):
    net, inputs = model(family, attention), collate(samples(family)[batch])
    reducer = Random(keep=9, seed=2)
    with foveate.attach(net, reducer, rectify=STRENGTH):
        chosen = generate(net, inputs)
    monkeypatch.setattr(hooks, "takes_mask", lambda *_: masked)
    with foveate.attach(net, reducer, rectify=STRENGTH):
        out = generate(net, inputs)
        without_cache = generate(net, inputs, use_cache=False)
    with foveate.attach(net, reducer):
        plain = generate(net, inputs)
    for other in (chosen, without_cache):
        close(torch.stack(out.logits), torch.stack(other.logits))
    assert (out.logits[0] - plain.logits[0]).abs().max() > 1e-3


def test_what_a_model_uses_decides_about_the_route():
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    assert takes_mask("sdpa", mask, 5, {})
    assert takes_mask("eager", mask.float(), 5, {})
    assert takes_mask("sdpa", None, 1, {})
    assert takes_mask("sdpa", None, 5, {"softcap": 30.0})
    assert not takes_mask("sdpa", None, 5, {})
    assert not takes_mask("flash_attention_2", None, 1, {})
    assert not takes_mask("kernels-community/flash-attn", torch.ones(1, 5), 5, {})


@every_family_in_depth
def test_beams(family):
    if not TINIES[family].masks:
        pytest.skip("this language model takes no 4-D mask")
    net, inputs = model(family), collate(samples(family))
    with foveate.attach(net, Random(keep=9, seed=2), positions="original", rectify=STRENGTH) as handle:
        out = generate(net, inputs, num_beams=3, num_return_sequences=2, max_new_tokens=5, output_scores=True)
        stages = stages_of(handle)
    raised = planes(net, inputs, stages)
    for k in (0, 1):
        answers = answer_of(out, inputs)[k::2]
        logits = expected(net, inputs, stages, answers, raised)
        close(out.sequences_scores[k::2], logits.log_softmax(-1).gather(-1, answers[..., None]).sum((1, 2)) / 5)


OPTIONS = [
    {"do_sample": True, "num_return_sequences": 2},
    {"use_cache": False},
    {"prompt_lookup_num_tokens": 3},
    {"prefill_chunk_size": 4},
    {"cache_implementation": "static"},
]


@pytest.mark.parametrize("method", [Random(keep=9, seed=2), INSIDE[1]], ids=["before", "chain"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ways_to_generate(options, method):
    if "prefill_chunk_size" in options and CACHE == "past_key_values":
        pytest.skip("transformers 5.19 loses positions in chunks")
    alone = "prompt_lookup_num_tokens" in options  # transformers takes one prompt
    net, inputs = deep_model("llava"), collate(samples("llava")[1:2] if alone else samples("llava"))
    if method.stages()[-1].stage == "in_llm" and options.keys() & {
        "use_cache", "prompt_lookup_num_tokens", "prefill_chunk_size", "cache_implementation",
    }:  # fmt: skip
        pytest.skip("refused inside the LLM")
    with foveate.attach(net, method, positions="original", rectify=STRENGTH) as handle:
        out = generate(net, inputs, **options)
        stages = stages_of(handle)
    raised, each = planes(net, inputs, stages), options.get("num_return_sequences", 1)
    for k in range(each):
        answers = answer_of(out, inputs)[k::each]
        logits = expected(net, inputs, stages, answers, raised)
        close(torch.stack(out.logits, 1)[k::each], logits)


@pytest.mark.parametrize("method", [Random(keep=9, seed=2), *INSIDE[:2]], ids=["before", "inside", "chain"])
@pytest.mark.parametrize("new_image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("only_new", [False, True], ids=["full-ids", "new-ids"])
@every_family_in_depth
def test_second_turn_on_the_same_cache(family, only_new, new_image, method):
    if foveate.families.all_families()[family].lacks(method) or not TINIES[family].masks:
        pytest.skip("not for this family")
    net, first = deep_model(family), samples(family)
    second = [sample(2, *([VISUALS[family][0]] if new_image else []), 4, seed=20 + i) for i in range(3)]
    inputs, cache = collate(first), TINIES[family].cache(net)
    with foveate.attach(net, method, positions="original", rectify=STRENGTH) as handle:
        one = generate(net, inputs, max_new_tokens=4, **{CACHE: cache})
        before = stages_of(handle)
        whole = collate(joined(first, answer_of(one, inputs), second))
        turn = {k: x for k, x in collate(second).items() if not k.endswith(("_ids", "attention_mask")) or "pixel" in k}
        turn |= {k: whole[k] for k in ("input_ids", "attention_mask", "token_type_ids") if k in whole}
        if only_new:
            turn["input_ids"] = turn["input_ids"][:, one.sequences.shape[1] - 1 :]
        two = generate(net, turn, **{CACHE: cache})
        after = stages_of(handle) if new_image else []
    raised = planes(net, inputs, before)
    length = whole["input_ids"].shape[1]
    if new_image:
        later = planes(net, {**collate(second)}, after)
        width = collate(second)["input_ids"].shape[1]
        assert sorted(raised) == sorted(later)
        raised = {
            layer: pad(plane, (0, length - plane.shape[1])) + pad(later[layer], (length - width, 0))
            for layer, plane in raised.items()
        }
    else:
        raised = {layer: pad(plane, (0, length - plane.shape[1])) for layer, plane in raised.items()}
    stages = [
        (layer, [a + b for a, b in zip(rows, dict(after)[layer] if new_image else [[]] * 3, strict=True)])
        for layer, rows in before
    ]
    close(torch.stack(two.logits, 1), expected(net, whole, stages, answer_of(two, turn), raised))


def test_whole_budget_changes_no_bit():
    net, inputs = model("llava"), collate(samples("llava"))
    plain = generate(net, inputs)
    for method in (Uniform(keep=1.0), Uniform(keep=64), FastV(keep=1.0, layer=1)):
        with foveate.attach(net, method, rectify=STRENGTH):
            out = generate(net, inputs)
        assert torch.equal(torch.stack(out.logits), torch.stack(plain.logits))


def test_prompts_without_images():
    net, inputs = model("llava"), collate([sample(7), sample(4, seed=1)])
    plain = generate(net, inputs)
    with foveate.attach(net, Uniform(keep=9), rectify=STRENGTH):
        out = generate(net, inputs)
    assert torch.equal(torch.stack(out.logits), torch.stack(plain.logits))


def test_detaching_leaves_nothing_behind():
    net, inputs = model("llava"), collate(samples("llava"))
    before = {name: module.config for name, module in net.named_modules() if hasattr(module, "config")}
    implementation, plain = net.config._attn_implementation, generate(net, inputs)
    with foveate.attach(net, Uniform(keep=9), rectify=STRENGTH):
        generate(net, inputs)
        assert net.config._attn_implementation == implementation
    after = {name: module.config for name, module in net.named_modules() if hasattr(module, "config")}
    assert all(after[name] is config for name, config in before.items())
    assert torch.equal(torch.stack(generate(net, inputs).logits), torch.stack(plain.logits))


@pytest.mark.parametrize("side", ["left", "right"])
@every_family_in_depth
def test_a_prompt_alone_and_in_a_batch(family, side):
    net, rows = model(family), samples(family)
    with foveate.attach(net, Random(keep=9, seed=2), rectify=STRENGTH), torch.no_grad():
        together = net(**collate(rows, side)).logits
        for i, row in enumerate(rows):
            single = net(**collate([row])).logits[0]
            close(together[i, : len(single)] if side == "right" else together[i, -len(single) :], single)


@pytest.mark.parametrize("method", [("uniform", {}), ("visionzip", {})], ids=lambda m: m[0])
@torch.no_grad()
def test_packed_rows(method):
    net = model("llava")
    inputs, alone = packed("llava", net)
    with foveate.attach(net, method[0], keep=0.3, positions="compact", rectify=STRENGTH):
        together = net(**inputs, use_cache=False).logits[0]
        single = [net(**one).logits[0] for one in alone]
    start = 0
    for one in single:
        close(together[start : start + len(one)], one)
        start += len(one)


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "wider-heads"])
@pytest.mark.parametrize("absorb", [False, True], ids=["kept", "absorbed"])
def test_gradients_flow(masked, absorb, monkeypatch):
    net, inputs = model("llava"), collate(samples("llava")[1:2])
    weight = net.model.multi_modal_projector.linear_1.weight
    found = []
    for way in (masked, not masked):
        monkeypatch.setattr(hooks, "takes_mask", lambda *_, way=way: way)
        with foveate.attach(net, Uniform(keep=9), rectify=STRENGTH, absorb=absorb):
            logits = net(**inputs).logits
        found.append(torch.autograd.grad(logits[0, -1].logsumexp(-1), weight)[0])
    assert found[0].abs().max() > 0
    close(found[0], found[1])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [slice(1, 2), slice(None)], ids=["alone", "batch"])
@torch.no_grad()
def test_ambient_state(batch, attention, monkeypatch):
    net, inputs = model("llava", attention), collate(samples("llava")[batch])
    with foveate.attach(net, Uniform(keep=9), rectify=STRENGTH, absorb=True):
        plain = net(**inputs).logits[:, -1]
        torch.set_default_dtype(torch.float64)
        try:
            close(net(**inputs).logits[:, -1], plain)
        finally:
            torch.set_default_dtype(torch.float32)
        found = []
        for way in (True, False):
            monkeypatch.setattr(hooks, "takes_mask", lambda *_, way=way: way)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found.append(net(**inputs).logits[:, -1])
    close(found[0], found[1], torch.bfloat16)
    assert (found[0].float() - plain).abs().mean() < 0.15


@torch.no_grad()
def test_a_token_twice_is_the_token_once_with_the_logarithm_of_two():
    net, ids = model("llava"), torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(3))
    embeds = net.get_input_embeddings()(ids)
    order = [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 11]
    place = torch.tensor(order)[None]
    seen = place[0, :, None] >= place[0]  # both copies see each other
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    twice = net(inputs_embeds=embeds[:, order], position_ids=place, attention_mask=mask).logits
    plane = torch.zeros(1, 12)
    plane[0, 5] = math.log(2)
    with hooks.biased(net, Bias({0: plane})):
        once = net(inputs_embeds=embeds).logits
    close(once[:, order], twice)
    assert (once - net(inputs_embeds=embeds).logits).abs().max() > 1e-3


def test_what_goes_together_and_what_is_refused():
    net, inputs = model("llava"), collate(samples("llava"))
    with pytest.raises(InputError, match="no change of its inputs"):
        foveate.reduce(net, inputs, "uniform", keep=9, rectify=0.5)
    for wrong in (-0.5, float("nan"), float("inf"), "1", True):
        with pytest.raises(InputError, match="rectify is a finite number"):
            foveate.attach(net, "uniform", keep=9, rectify=wrong)
    with pytest.raises(InputError, match="absorb is True or False"):
        foveate.attach(net, "uniform", keep=9, absorb=1)
    for name, reason in (
        ("cdpruner", "by the question"), ("gaze_query", "by the question"), ("pyramiddrop", "drops nothing there"),
        ("downsample", "no embeddings"), ("tome", "no embeddings"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=reason):
            foveate.attach(net, name, keep=0.5, absorb=True)
    with pytest.raises(InputError, match="by the question"):
        foveate.attach(net, Chain(CDPruner(keep=20), Uniform(keep=9)), absorb=True)
    with foveate.attach(net, Chain(Uniform(keep=20), FastV(keep=9, layer=1)), absorb=True) as handle:
        assert handle.settings.absorb
        assert handle.settings.rectify == 0  # absorb does not turn it on


def test_absorbed_embeddings_are_means_with_the_old_norms():
    net, inputs = model("llava"), collate(samples("llava"))
    plain = embedded_rows(foveate.reduce(net, inputs, "uniform", keep=9))
    absorbed = foveate.reduce(net, inputs, "uniform", keep=9, absorb=True)
    for old, new in zip(plain, embedded_rows(absorbed), strict=True):
        close(new.norm(dim=-1), old.norm(dim=-1))
        assert (new - old).abs().amax(dim=-1).max() > 1e-3
    attached = {}
    with foveate.attach(net, "uniform", keep=9, absorb=True):
        attached["logits"] = generate(net, inputs).logits[0]
    close(attached["logits"], generate(net, absorbed).logits[0])


def test_a_cache_with_a_bias_is_not_continued_without():
    net, inputs = model("llava"), collate(samples("llava"))
    cache = DynamicCache()
    with foveate.attach(net, Uniform(keep=9), rectify=STRENGTH):
        out = generate(net, inputs, **{CACHE: cache})
    further = {"input_ids": out.sequences, "attention_mask": pad(inputs["attention_mask"], (0, 9), value=1)}
    with foveate.attach(net, Uniform(keep=9)), pytest.raises(InputError, match="with rectify"):
        generate(net, further, **{CACHE: cache})


def test_gradient_checkpointing_is_refused():
    net, inputs = model("llava"), collate(samples("llava"))
    net.gradient_checkpointing_enable()
    net.train()
    try:
        with (
            foveate.attach(net, Uniform(keep=9), rectify=STRENGTH),
            pytest.raises(UnsupportedModelError, match="gradient checkpointing"),
        ):
            net(**inputs)
    finally:
        net.eval()
        net.gradient_checkpointing_disable()


@pytest.mark.parametrize("family", ["lfm2_vl", "qwen3_5"])
def test_layers_without_attention_have_no_bias(family):
    net, inputs = model(family), collate(samples(family))
    with foveate.attach(net, Uniform(keep=9), rectify=STRENGTH):
        out = generate(net, inputs)
        without_cache = generate(net, inputs, use_cache=False)
    with foveate.attach(net, Uniform(keep=9)):
        plain = generate(net, inputs)
    close(torch.stack(out.logits), torch.stack(without_cache.logits))
    assert (out.logits[0] - plain.logits[0]).abs().max() > 1e-3
