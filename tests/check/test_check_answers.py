"""The checks of what a model says: right for every shape, and able to fail."""

from __future__ import annotations

import pytest
import torch

from foveate.check import answers
from foveate.check.answers import alone_as_in_batch, as_hidden, by_place, run, settings_of, unchanged
from foveate.check.oracle import hide, oracle_logits, other_kernel
from foveate.check.subjects import TINY, answers_for, load_subject
from foveate.check.verdicts import judged
from foveate.core.errors import UnsupportedModelError
from foveate.cost.shapes import SHAPES
from foveate.registry import load_reducer

SHORT = ("llava-1.5-7b", "qwen2.5-vl-7b")
every_shape = pytest.mark.parametrize(
    "shape", [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in SHAPES]
)
both_places = pytest.mark.parametrize("inside", [False, True], ids=["before", "inside"])


@every_shape
def test_every_shape_is_right(shape):
    subject = load_subject(TINY + shape, "cpu", "auto", None)
    assert subject.jobs[0].text_tokens < subject.jobs[1].text_tokens
    assert not subject.pair.inputs["attention_mask"].all()
    for reducer in (subject.before(), subject.inside()):
        for look in (unchanged, as_hidden):
            verdict = look(subject, reducer)
            assert verdict.word == "right", verdict
    for inside in (False, True):
        assert alone_as_in_batch(subject, by_place(subject, inside)).word == "right"


def test_bfloat16_is_judged_by_its_own_noise():
    subject = load_subject("tiny-llava-1.5-7b", "cpu", "bfloat16", None)
    verdict = as_hidden(subject, subject.before())
    assert verdict.word == "right"
    assert 1e-3 < verdict.figures["limit"] < verdict.figures["signal"]


def test_what_was_kept_is_told(subject):
    kept = as_hidden(subject, subject.inside()).figures["kept"]
    assert kept == {"2": [[16], [16]]}


class Perturbed:
    """Lets a layer of the LLM add something, where it gets fewer columns than the prompt has."""

    def __init__(self, model, layer, columns, size):
        self._model, self._number, self._columns, self._size = model, layer, columns, size

    def __enter__(self):
        def hook(_layer, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            if 1 < hidden.shape[1] < self._columns:
                hidden += self._size
            return args, kwargs

        layer = self._model.get_decoder().layers[self._number]
        # Behind the hooks of the library, which cut the columns.
        self._hook = layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)

    def __exit__(self, *_):
        self._hook.remove()


@both_places
def test_perturbed_logits_are_wrong(subject, inside):
    reducer = subject.inside() if inside else subject.before()
    columns = min(job.inputs["input_ids"].shape[1] for job in subject.jobs)
    with Perturbed(subject.model, 3, columns, 0.01):
        verdict = as_hidden(subject, reducer)
    assert verdict.word == "wrong"
    assert verdict.figures["error"] > verdict.figures["limit"]
    assert as_hidden(subject, reducer).word == "right"


def test_logits_that_are_no_numbers_are_wrong(subject, monkeypatch):
    own = answers.run

    def spoilt(*args):
        found = own(*args)
        found.logits[0, 0] = torch.nan
        return found

    monkeypatch.setattr(answers, "run", spoilt)
    assert as_hidden(subject, subject.before()).word == "wrong"


def test_a_model_that_ignores_its_tokens_proves_nothing(subject, monkeypatch):
    monkeypatch.setattr(answers, "_others", lambda rows: rows)
    verdict = as_hidden(subject, subject.before())
    assert verdict.word == "not run"
    assert "does not tell tokens apart" in verdict.said


def test_a_change_at_a_budget_that_covers_all_is_wrong(subject, monkeypatch):
    own = answers.attach_with

    def rounding(model, *args):
        handle = own(model, *args)
        hook = model.lm_head.register_forward_hook(lambda _module, _args, out: out * (1 + 1e-6))
        detach = handle.detach
        handle.detach = lambda: (hook.remove(), detach())
        return handle

    monkeypatch.setattr(answers, "attach_with", rounding)
    verdict = unchanged(subject, subject.before())
    assert verdict.word == "wrong"
    assert "differ by" in verdict.said


def test_a_model_that_differs_from_itself_proves_nothing(subject):
    hook = subject.model.lm_head.register_forward_hook(lambda _module, _args, out: out + 0.1 * torch.rand(()))
    try:
        verdict = unchanged(subject, subject.before())
    finally:
        hook.remove()
    assert verdict.word == "not run"
    assert "differs from itself" in verdict.said


def test_a_method_that_keeps_others_in_batches_is_wrong(subject, broken):
    verdict = alone_as_in_batch(subject, broken)
    assert verdict.word == "wrong"
    assert "keeps other tokens alone than in a batch" in verdict.said


def test_logits_that_depend_on_the_batch_are_wrong(subject, monkeypatch):
    own = answers.run

    def leaking(job, settings, dictated):
        found = own(job, settings, dictated)
        if settings is not None and job.prompts == 1:
            found.logits.mul_(1.001)
        return found

    monkeypatch.setattr(answers, "run", leaking)
    assert alone_as_in_batch(subject, by_place(subject, False)).word == "wrong"


def test_a_method_that_drops_nothing_of_short_prompts_is_not_run(subject):
    assert as_hidden(subject, load_reducer("random", keep=64)).word == "not run"


def test_answers_are_words_of_the_prompt(subject):
    job = subject.pair
    said = answers_for(job, 5)
    assert said.shape == (2, 5)
    assert not bool((said == subject.model.config.image_token_id).any())
    found = run(job, None, said)
    assert found.logits.shape[:2] == (2, 5)


def test_the_oracle_of_what_is_kept_whole_is_the_plain_model(subject):
    job = subject.pair
    said = answers_for(job, 5)
    plain = run(job, None, said).logits
    torch.testing.assert_close(oracle_logits(job, {}, said), plain, atol=1e-5, rtol=1e-5)


def test_oracles_are_refused_where_hiding_is_not_dropping(subject, monkeypatch):
    found = run(subject.pair, settings_of(subject, subject.before()), answers_for(subject.pair, 5))
    monkeypatch.setattr(type(subject.family), "recurrent", True)
    with pytest.raises(UnsupportedModelError, match="hiding is not dropping"):
        oracle_logits(subject.pair, found.cuts, answers_for(subject.pair, 5))
    monkeypatch.undo()
    monkeypatch.setattr(subject.model.get_decoder().config, "sliding_window", 100, raising=False)
    with pytest.raises(UnsupportedModelError, match="sliding window of 100"):
        oracle_logits(subject.pair, found.cuts, answers_for(subject.pair, 5))


def test_the_other_kernel_is_there_for_as_long_as_it_is_wanted(subject):
    config = subject.model.get_decoder().config

    def fails():
        with other_kernel(subject.model):
            assert config._attn_implementation == "eager"
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert config._attn_implementation == "sdpa"


SEEN = torch.tensor([[True, False, True], [True, True, True]])
DUE = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()  # of the first row: itself, and what came before


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_columns_are_hidden_in_masks_of_every_kind(kind):
    causal = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]
    least = torch.finfo(torch.float32).min
    given = {"none": None, "bool": causal, "float": torch.zeros(1, 1, 3, 3).masked_fill(~causal, least)}[kind]
    found = hide(given, SEEN, "sdpa")
    shown = found if found.dtype == torch.bool else found == 0
    assert shown[0, 0].tolist() == DUE.tolist()
    assert shown[1, 0].tolist() == causal[0, 0].tolist()


def test_columns_are_hidden_from_flash_attention():
    assert hide(None, SEEN, "flash_attention_2").tolist() == [[1, 0, 1], [1, 1, 1]]
    assert hide(torch.tensor([[1, 1, 1], [0, 1, 1]]), SEEN, "flash_attention_2").tolist() == [[1, 0, 1], [0, 1, 1]]


def test_an_error_inside_is_a_fault(subject, monkeypatch):
    from foveate.check.verdicts import Minutes

    def fails(*_args, **_kwargs):
        raise RuntimeError("the kernel\nbroke")

    monkeypatch.setattr(subject.model, "generate", fails)
    verdict = judged("keep all", lambda: unchanged(subject, subject.before()), Minutes(1))
    assert (verdict.word, verdict.said) == ("wrong", "RuntimeError: the kernel")
