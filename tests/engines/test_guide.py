"""A small model guides a large one: scores, cuts, and answers in its place."""

from __future__ import annotations

import copy

import pytest
import torch
from layered import layered_answer
from transformers import GenerationConfig

import foveate
from foveate import Chain, FoveateError
from foveate.core.errors import AttachError, InputError
from foveate.core.selection import SpanSelection
from foveate.families import family_of
from foveate.guided.prompts import prompts_only, with_answer
from foveate.methods import SGL, VisPruner
from tiny import IN_LLM_FAMILIES, TINIES, VISUALS, collate, deep_model, in_depth, model, sample, samples

T = 7
every_family_in_depth = pytest.mark.parametrize("family", [pytest.param(f, marks=in_depth(f)) for f in IN_LLM_FAMILIES])


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a.float(), b.float(), atol=tolerance, rtol=tolerance)


def reference(net, inputs, answer, stops=(), include_last_visual=True):
    """Sum whole attention maps over layers, heads and rows."""
    family = family_of(net)
    longer, width = with_answer(family, inputs, answer), inputs["input_ids"].shape[1]
    longer["position_ids"] = TINIES[family.name].position_ids(net, longer)
    with torch.no_grad():
        maps = net(**longer, output_attentions=True, use_cache=False).attentions
    total, scores = sum(x.sum(dim=1) for x in maps), {}
    for i in range(len(answer)):
        columns = torch.cat([s.columns for s in family.spans(net, inputs) if s.sample == i])
        text = inputs["attention_mask"][i].nonzero().flatten()
        rows = text[text > columns[-1] - int(include_last_visual)].tolist()
        for t, token in enumerate(answer[i, :-1].tolist()):
            if token in stops:
                break
            rows.append(width + t)
        scores[i] = total[i][rows][:, columns].sum(dim=0)
    return scores


@every_family_in_depth
def test_scores_equal_whole_maps(family):
    net, inputs = deep_model(family, "eager"), collate(samples(family))
    count = 1 if family == "paligemma" else T  # its maps with an answer behind the prompt are others
    plain = net.generate(**inputs, max_new_tokens=count)[:, inputs["input_ids"].shape[1] :]
    for attention in ("eager", "sdpa"):
        small = deep_model(family, attention)
        for include in (False, True):
            guided = foveate.guide(small, small, SGL(layer=2, include_last_visual=include))
            guided.generate(**inputs, max_new_tokens=count)
            for i, scores in reference(net, inputs, plain, include_last_visual=include).items():
                close(guided.outcomes[i].scores, scores, 1e-3)


def test_scores_do_not_depend_on_the_batch_where_answers_end():
    net, rows = deep_model("llava"), samples("llava")
    plain = net.generate(**collate(rows), max_new_tokens=T)[:, -T:]
    stop = int(plain[0, 2])
    options = {"max_new_tokens": T, "eos_token_id": stop, "pad_token_id": 0}
    guided = foveate.guide(net, net, SGL(keep=0.2, layer=2), exit_at=0.3)
    together = guided.generate(**collate(rows), **options)
    outcomes, width = guided.outcomes, collate(rows)["input_ids"].shape[1]
    eager = deep_model("llava", "eager")
    expected = reference(eager, collate(rows), plain, stops=(stop,))
    for i, row in enumerate(rows):
        single = guided.generate(**collate([row]), **options)
        own, length = guided.outcomes[0], len(row["ids"])
        close(own.scores, outcomes[i].scores)
        close(own.scores, expected[i], 1e-3)
        assert own.source == outcomes[i].source
        assert own.confidence == pytest.approx(outcomes[i].confidence, abs=1e-5)
        assert own.consistency == pytest.approx(outcomes[i].consistency, abs=1e-5)
        answer, further = single[0, length:].tolist(), together[i, width:].tolist()
        assert further[: len(answer)] == answer
        assert set(further[len(answer) :]) <= {0}


@every_family_in_depth
def test_scores_from_elsewhere(family):
    net, inputs = deep_model(family), collate(samples(family))
    spans, generator = family_of(net).spans(net, inputs), torch.Generator().manual_seed(1)
    scores = [
        torch.rand(sum(len(s) for s in spans if s.sample == i), generator=generator)
        for i in dict.fromkeys(s.sample for s in spans)
    ]
    with foveate.attach(net, SGL(keep=0.3, layer=2)) as handle, handle.scored(scores):
        out = net.generate(**inputs, max_new_tokens=T, return_dict_in_generate=True, output_logits=True)
    for own, row in zip(scores, handle.selections, strict=True):
        kept = own.argsort(descending=True)[: int(len(own) * 0.3)].sort().values
        starts = torch.tensor([0, *(s.length for s in row)]).cumsum(0)
        assert torch.equal(torch.cat([s.kept + a for s, a in zip(row, starts, strict=False)]), kept)
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    close(torch.stack(out.logits, 1), layered_answer(net, inputs, handle.layers, answer, "original"))


def test_scores_behind_a_method_before_the_llm():
    net, inputs = deep_model("llava"), collate(samples("llava"))
    scores = [torch.rand(n, generator=torch.Generator().manual_seed(n)) for n in (64, 128, 64)]
    with foveate.attach(net, Chain(VisPruner(keep=20), SGL(keep=8, layer=2))) as handle, handle.scored(scores):
        net.generate(**inputs, max_new_tokens=2)
        final = handle.selections
    before = foveate.reduce(net, inputs, VisPruner(keep=20)).selection.by_prompt(3)
    left = set(before[0][0].kept.tolist())
    ranked = [i for i in scores[0].argsort(descending=True).tolist() if i in left]
    assert final[0][0].kept.tolist() == sorted(ranked[:8])


def test_scores_must_be_there_and_fit():
    net, inputs = deep_model("llava"), collate(samples("llava"))
    with foveate.attach(net, SGL(keep=0.3, layer=2)) as handle:
        with pytest.raises(FoveateError, match=r"foveate\.guide"):
            net.generate(**inputs, max_new_tokens=2)
        for wrong, message in [
            ([[0.5] * 64] * 3, r"one real tensor \[n\] .* \[0\] is a list"),
            ([torch.rand(64), 0.5], r"\[1\] is a float"),
            ([torch.rand(1, 64)] * 3, r"shape \(1, 64\)"),
            ([torch.rand(64), torch.full((128,), torch.nan)], r"\[1\] .* NaN"),
        ]:
            with pytest.raises(InputError, match=message), handle.scored(wrong):
                pass
        with handle.scored([torch.rand(64)] * 3), pytest.raises(FoveateError, match=r"\[64, 128, 64\]"):
            net.generate(**inputs, max_new_tokens=2)


@every_family_in_depth
def test_a_model_guides_itself(family):
    net, inputs = deep_model(family), collate(samples(family))
    whole = foveate.guide(net, net, SGL(keep=1.0, layer=2)).generate(**inputs, max_new_tokens=T)
    assert torch.equal(whole, net.generate(**inputs, max_new_tokens=T))
    guided = foveate.guide(net, net, SGL(keep=0.25, layer=1))
    out = guided.generate(**inputs, max_new_tokens=T)
    assert [o.source for o in guided.outcomes] == ["large"] * 3
    assert all(o.consistency is None for o in guided.outcomes)
    with foveate.attach(net, SGL(keep=0.25, layer=1)) as handle, handle.scored([o.scores for o in guided.outcomes]):
        assert torch.equal(net.generate(**inputs, max_new_tokens=T), out)


@pytest.mark.parametrize("exit_at", [0.0, 1.0])
def test_an_early_exit_skips_the_large_model(exit_at):
    large, small, inputs = deep_model("llava"), model("llava"), collate(samples("llava"))
    calls = []
    large.register_forward_pre_hook(lambda *_: calls.append(1))
    large.model.vision_tower.register_forward_pre_hook(lambda *_: calls.append(1))
    guided = foveate.guide(large, small, SGL(layer=2), exit_at=exit_at)
    out = guided.generate(**inputs, max_new_tokens=T)
    for outcome in guided.outcomes:
        assert outcome.score == pytest.approx((outcome.confidence + outcome.consistency) / 2)
        assert 0 < outcome.score < 1
    if exit_at:
        assert [o.source for o in guided.outcomes] == ["large"] * 3
        assert len(calls) >= T
    else:
        assert [o.source for o in guided.outcomes] == ["small"] * 3
        assert not calls
        assert torch.equal(out, small.generate(**inputs, max_new_tokens=T))


def consistency_by_hand(net, inputs, scores, answer, share):
    """Run the plain model with all but the best columns hidden in every layer."""
    rows = []
    for i, own in enumerate(scores):
        start, row = 0, []
        spans = [s for s in family_of(net).spans(net, inputs) if s.sample == i]
        own = own.clone()
        for span in spans:  # newline vectors are left out, and do not count
            own[span.separators() + start] = -1.0
            start += len(span)
        kept, start = own.argsort(descending=True)[: max(int((own >= 0).sum() * share), 1)].sort().values, 0
        for n in map(len, spans):
            row.append(SpanSelection(n, kept[(kept >= start) & (kept < start + n)] - start))
            start += n
        rows.append(row)
    logits = layered_answer(net, inputs, {0: rows}, answer, "original").log_softmax(-1)
    return logits.gather(-1, answer[..., None])[..., 0].sum(1).exp()


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("share", [0.05, 0.4])
def test_consistency_equals_hidden_columns(family, share):
    net, inputs = deep_model(family), collate(samples(family))
    guided = foveate.guide(net, net, SGL(layer=2, consistency_keep=share), exit_at=0.0)
    out = guided.generate(**inputs, max_new_tokens=3)
    expected = consistency_by_hand(
        net, inputs, [o.scores for o in guided.outcomes], out[:, inputs["input_ids"].shape[1] :], share
    )
    for outcome, value in zip(guided.outcomes, expected.tolist(), strict=True):
        assert outcome.consistency == pytest.approx(value, rel=1e-3)


@every_family_in_depth
def test_some_prompts_of_a_batch_leave_early(family):
    small, large, rows = deep_model(family), deep_model(family), samples(family)
    inputs = collate(rows)
    guided = foveate.guide(large, small, SGL(keep=0.25, layer=2, geometric=True), exit_at=0.0)
    guided.generate(**inputs, max_new_tokens=3)
    scores = sorted(o.score for o in guided.outcomes)
    guided.exit_at = (scores[1] + scores[2]) / 2
    seen = []
    large.register_forward_pre_hook(lambda _, a, k: seen.append(len(k["input_ids"])), with_kwargs=True)
    out = guided.generate(**inputs, max_new_tokens=3)
    assert [o.source for o in guided.outcomes].count("small") == 1
    assert set(seen) <= {2, 3}
    if family in ("llava", "llava_next", "qwen2_5_vl", "internvl", "video_llava"):
        assert set(seen) == {2}
    width = inputs["input_ids"].shape[1]
    for i, row in enumerate(rows):
        single = guided.generate(**collate([row]), max_new_tokens=3)
        assert single[0, len(row["ids"]) :].tolist() == out[i, width:].tolist()


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "internvl", "pixtral"])
def test_prompts_taken_out_of_a_batch(family):
    net, rows = deep_model(family), samples(family)
    inputs = collate(rows)
    part = prompts_only(family_of(net), inputs, family_of(net).spans(net, inputs), [1, 2])
    if part is None:
        pytest.skip("it cannot be told which pixels are whose")
    with torch.no_grad():
        close(net(**part).logits, net(**inputs).logits[1:])


def test_a_prompt_without_image_and_one_that_ends_with_it():
    net = deep_model("llava")
    inputs = collate([sample(3, "image"), sample(70, seed=1), sample(3, "image", 4, seed=2)])
    guided = foveate.guide(net, net, SGL(keep=0.25, layer=2), exit_at=1.0)
    out = guided.generate(**inputs, max_new_tokens=4)
    assert [len(o.scores) for o in guided.outcomes] == [64, 0, 64]
    assert all(o.scores.sum() > 0 for o in guided.outcomes if len(o.scores))
    plain = net.generate(**inputs, max_new_tokens=4)
    assert torch.equal(out[1], plain[1])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_batch_of_text_alone_is_for_the_large_model(family):
    large, small = deep_model(family), deep_model(family)
    calls, visual = [], dict.fromkeys(family_of(large).inputs)
    small.register_forward_pre_hook(lambda *_: calls.append(1))
    inputs = collate([sample(70, seed=1), sample(9, seed=2)])
    guided = foveate.guide(large, small, SGL(keep=0.25, layer=2), exit_at=0.0)
    plain = large.generate(**inputs, max_new_tokens=3)
    for given in (inputs, {**inputs, **visual}):
        assert torch.equal(guided.generate(**given, max_new_tokens=3), plain)
        assert [(o.source, o.confidence, o.consistency, len(o.scores)) for o in guided.outcomes] == [
            ("large", 0.0, None, 0)
        ] * 2
    assert not calls
    assert guided.scores(**inputs, max_new_tokens=2) == []
    with pytest.raises(FoveateError, match="lay visual tokens out differently"):
        guided.generate(**inputs, small_inputs=collate(samples(family)[:2]))


def test_an_empty_answer_goes_to_the_large_model():
    net, inputs = deep_model("llava"), collate([sample(4, "image", 5)])
    first = int(net.generate(**inputs, max_new_tokens=1)[0, -1])
    guided = foveate.guide(net, net, SGL(layer=2), exit_at=0.0)
    guided.generate(**inputs, max_new_tokens=3, eos_token_id=first, pad_token_id=0)
    assert guided.outcomes[0].source == "large"
    assert guided.outcomes[0].confidence == 0.0


def test_other_layouts_are_refused_or_resampled():
    large, small = deep_model("qwen2_5_vl"), deep_model("llava")
    visual = VISUALS["qwen2_5_vl"][0]
    inputs, other = collate([sample(3, visual, 4)]), collate([sample(3, "image", 4)])
    with pytest.raises(FoveateError, match="resample=True"):
        foveate.guide(large, small, SGL(layer=2)).generate(**inputs, small_inputs=other)
    guided = foveate.guide(large, small, SGL(keep=0.5, layer=2), resample=True)
    out = guided.generate(**inputs, small_inputs=other, max_new_tokens=3)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3
    two = collate([sample(3, "image", 4, "image", 2)])
    with pytest.raises(FoveateError, match="cannot be moved"):
        guided.generate(**inputs, small_inputs=two)


def test_nothing_stays_on_the_models():
    large, small, inputs = deep_model("llava"), model("llava"), collate(samples("llava"))
    for net in (large, small):
        net.generate(**inputs, max_new_tokens=1)
    state = [[dict(vars(m)) for m in net.modules()] for net in (large, small)]
    foveate.guide(large, small, SGL(layer=2), exit_at=1.0).generate(**inputs, max_new_tokens=3)
    for net, before in zip((large, small), state, strict=True):
        for module, was in zip(net.modules(), before, strict=True):
            assert vars(module).get("config") is was.get("config")
            assert len(module._forward_hooks) == len(was["_forward_hooks"])
            assert len(module._forward_pre_hooks) == len(was["_forward_pre_hooks"])
            assert "generate" not in vars(module)


@pytest.mark.parametrize("option", [
    {"return_dict_in_generate": True}, {"num_return_sequences": 2}, {"past_key_values": object()},
    {"streamer": object()}, {"input_ids": None}])  # fmt: skip
def test_options_that_two_models_cannot_share(option):
    net, inputs = deep_model("llava"), collate(samples("llava"))
    with pytest.raises(FoveateError, match="guided"):
        foveate.guide(net, net, SGL(layer=2)).generate(**{**inputs, **option})


@pytest.mark.parametrize(
    "option", [{"return_dict_in_generate": True}, {"num_return_sequences": 2, "do_sample": True}], ids=str
)
@pytest.mark.parametrize("default", [False, True], ids=["given", "of the model"])
def test_such_options_in_a_configuration(option, default, monkeypatch):
    net, inputs = deep_model("llava"), collate(samples("llava"))
    guided, config = foveate.guide(net, net, SGL(layer=2)), GenerationConfig(max_new_tokens=2, **option)
    monkeypatch.setattr(net, "generation_config", config if default else net.generation_config)
    with pytest.raises(FoveateError, match=f"guided answer.* leave {next(iter(option))} out"):
        guided.generate(**inputs, **({} if default else {"generation_config": config}))


def test_options_in_a_configuration_serve_as_keywords():
    net, inputs = deep_model("llava"), collate(samples("llava"))
    guided = foveate.guide(net, net, SGL(keep=0.25, layer=2))
    out = guided.generate(**inputs, max_new_tokens=2)
    config = GenerationConfig(max_new_tokens=2, return_dict_in_generate=True)
    assert torch.equal(guided.generate(**inputs, generation_config=config, return_dict_in_generate=False), out)


def test_a_configuration_without_an_end_takes_that_of_the_model(monkeypatch):
    net, inputs = deep_model("llava"), collate(samples("llava")[:1])
    config = GenerationConfig(max_new_tokens=T)
    monkeypatch.setattr(net, "generation_config", GenerationConfig(pad_token_id=0))
    stop = int(net.generate(**inputs, max_new_tokens=T)[0, -T + 2])
    monkeypatch.setattr(net.generation_config, "eos_token_id", stop)
    guided = foveate.guide(net, net, SGL(layer=2), exit_at=0.0)
    given = [{"max_new_tokens": T}, {"generation_config": config}]
    confidences = [[guided.generate(**inputs, **g), guided.outcomes[0].confidence][1] for g in given]
    assert confidences[0] == confidences[1]


def test_other_methods_and_an_attached_small_model_are_refused():
    large, small, inputs = deep_model("llava"), copy.deepcopy(deep_model("llava")), collate(samples("llava"))
    with pytest.raises(InputError, match="pass an SGL"):
        foveate.guide(large, small, foveate.methods.FastV(keep=9))
    guided = foveate.guide(large, small)
    with foveate.attach(small, "uniform", keep=9), pytest.raises(AttachError, match="attached to the small model"):
        guided.generate(**inputs, max_new_tokens=2)


def test_bad_thresholds():
    net = deep_model("llava")
    with pytest.raises(FoveateError, match="exit_at"):
        foveate.guide(net, net, exit_at=2.0)
    with pytest.raises(FoveateError, match="layers 0 to 1"):
        foveate.guide(model("llava"), net, SGL(layer=2))
