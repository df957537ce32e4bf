"""``attach(..., logits="full")``: what ``forward`` returns stands at the columns of the full prompts."""

import functools

import numpy as np
import pytest
import torch
from oracle import close, hidden, visible_columns
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

import foveate
from foveate import Chain, VisPruner
from foveate.core.errors import FoveateError, InputError
from foveate.engines.transformers.caches import NAME as CACHE
from foveate.methods import Downsample, FastV, Random, SparseVLM, ToMe, Uniform, VisionZip, VisualExit
from tiny import FAMILIES, IN_LLM_FAMILIES, TINIES, VISUALS, collate, deep_model, in_depth, model, sample, samples

BEFORE = [Uniform(keep=9), VisionZip(keep=9), ToMe(keep=9), Downsample(keep=9)]
INSIDE = [FastV(keep=9, layer=1), SparseVLM(keep=0.3), VisualExit(keep=0.25)]
METHODS = [*BEFORE, *INSIDE, Chain(VisPruner(keep=16), FastV(keep=9, layer=2))]
methods = pytest.mark.parametrize("reducer", METHODS, ids=lambda r: "chain" if isinstance(r, Chain) else r.name)
families = pytest.mark.parametrize("family", [pytest.param(name, marks=in_depth(name)) for name in FAMILIES])
full = functools.partial(foveate.attach, logits="full")


def with_labels(inputs):
    """Train on all text, but for the first token of each prompt, which nothing predicts."""
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    return {**inputs, "labels": ids.masked_fill((mask == 0) | (mask.cumsum(1) == 1) | (ids > 110), -100)}


def check(rows, visible):
    """Compare rows ``[L, C]`` with what stands at the last visible column in front of each, zeros if there is none."""
    for column, row in enumerate(rows):
        before = [c for c in visible if c <= column]
        assert torch.equal(row, rows[before[-1]] if before else torch.zeros_like(row))


def check_batch(net, reducer, rows, side):
    inputs = with_labels(collate(rows, side))
    with foveate.attach(net, reducer):
        expected, alone = net(**inputs).loss, [net(**collate([row])).logits[0] for row in rows]
    with full(net, reducer) as handle:
        out, selections = net(**inputs), handle.selections
    assert torch.equal(out.loss, expected)
    assert out.logits.shape[:2] == inputs["input_ids"].shape
    for logits, visible in zip(out.logits, visible_columns(inputs, selections), strict=True):
        check(logits, visible)
    before, _ = foveate.core.in_llm.split(reducer.stages())
    given = foveate.reduce(net, inputs, before[0]).selection.by_prompt(len(rows)) if before else [[] for _ in rows]
    for i, logits in enumerate(out.logits):
        content = inputs["attention_mask"][i].nonzero().flatten().tolist()
        one = {key: inputs[key][i : i + 1] for key in ("input_ids", "attention_mask")}
        close(logits[visible_columns(one, given[i : i + 1])[0] if before else content], alone[i])


@methods
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_of_every_column(reducer, side):
    rows = [*samples("llava"), sample("image", 4, seed=5), sample(150, seed=6)]  # the last drops nothing and is longest
    check_batch(deep_model("llava"), reducer, rows, side)


@families
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_of_every_family(family, side):
    check_batch(model(family), Random(keep=9, seed=2), samples(family), side)
    if family in IN_LLM_FAMILIES:
        check_batch(deep_model(family), Chain(Random(keep=16, seed=2), FastV(keep=9, layer=2)), samples(family), side)


def smoothed(rows, labels, shift=1):
    """Return the smoothed loss of rows of logits ``[n, V]``, each predicting the label behind it."""
    logits, wanted = torch.cat([x[: len(x) - shift] for x in rows]), torch.cat([x[shift:] for x in labels])
    return torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-100, label_smoothing=0.1)


@families
@torch.no_grad()
def test_label_smoothing_is_that_of_the_model_with_hidden_columns(family):
    net, inputs = model(family), with_labels(collate(samples(family)))
    labels = inputs.pop("labels")
    reducer = Random(keep=9, seed=2)
    with full(net, reducer, positions="original") as handle:
        loss = LabelSmoother(0.1)(net(**inputs), labels, shift_labels=True)
        visible = visible_columns(inputs, handle.selections)
    logits = hidden(net, inputs, handle.selections)
    rows = [x[columns] for x, columns in zip(logits, visible, strict=True)]
    close(loss, smoothed(rows, [x[columns] for x, columns in zip(labels, visible, strict=True)]))


@methods
def test_a_trainer_that_smooths_labels_and_computes_metrics(reducer, tmp_path):
    net, rows = deep_model("llava"), samples("llava")
    seen = []

    def metrics(found):
        # As recipes do: the prediction at a column is that of the next one.
        right = (found.predictions.argmax(-1)[:, :-1] == found.label_ids[:, 1:])[found.label_ids[:, 1:] != -100]
        seen.append((found.predictions.shape[:2] == found.label_ids.shape, len(right), right.sum()))
        return {"accuracy": right.mean()}

    def joined(batch):
        return with_labels(collate([rows[one["row"]] for one in batch], "right"))

    args = TrainingArguments(
        str(tmp_path), label_smoothing_factor=0.1, per_device_eval_batch_size=3, use_cpu=True, report_to=[],
        remove_unused_columns=False, label_names=["labels"],
    )  # fmt: skip
    keys = ["past_key_values", "cache", "image_hidden_states", "image_outputs"]
    with full(net, reducer):
        trainer = Trainer(net, args, data_collator=joined, compute_metrics=metrics)
        found = trainer.evaluate([{"row": i} for i in range(len(rows))], ignore_keys=keys)
        loss = trainer.compute_loss(net, joined([{"row": i} for i in range(len(rows))]))
    logits, labels = [], []
    for row in rows:
        one = with_labels(collate([row]))
        with foveate.attach(net, reducer), torch.no_grad():
            logits.append(net(**one).logits[0])
        before, _ = foveate.core.in_llm.split(reducer.stages())
        labels.append((foveate.reduce(net, one, before[0]) if before else one)["labels"][0])
    right = torch.cat([(x[:-1].argmax(-1) == y[1:])[y[1:] != -100] for x, y in zip(logits, labels, strict=True)])
    assert seen == [(True, len(right), int(right.sum()))]
    np.testing.assert_allclose(found["eval_accuracy"], right.float().mean())
    # The trainer does not shift the labels of models that are no plain LLMs.
    close(loss, smoothed(logits, labels, shift=0))
    np.testing.assert_allclose(found["eval_loss"], loss.item(), rtol=1e-4)


@methods
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_log_likelihoods_of_answers(reducer, side):
    net, answers = deep_model("llava"), [2, 5, 1]
    rows = [sample(3, "image", 4, seed=1), sample(2, "image", 3, "image", 6, seed=2), sample(5, "image", 1, seed=3)]

    def likelihoods(logits, ids, ends):
        scores = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        return [row[end - n - 1 : end - 1].sum() for row, n, end in zip(scores, answers, ends, strict=True)]

    inputs = collate(rows, side)
    lengths = [inputs["input_ids"].shape[1] if side == "left" else len(row["ids"]) for row in rows]
    with full(net, reducer):
        found = likelihoods(net(**inputs).logits, inputs["input_ids"], lengths)
    for score, row, n in zip(found, rows, answers, strict=True):
        one = collate([row])
        with foveate.attach(net, reducer):
            logits = net(**one).logits[0, -n - 1 : -1].log_softmax(-1)
        close(score, logits.gather(1, one["input_ids"][0, -n:, None]).sum())


@methods
@torch.no_grad()
def test_wanted_columns_are_those_of_the_full_logits(reducer):
    net = deep_model("llava")
    inputs = collate([*samples("llava"), sample(80, "image", 1, seed=4)])  # keep different columns
    length = inputs["input_ids"].shape[1]
    with full(net, reducer):
        every = net(**inputs).logits
        for count in (0, 1, 3, 90, length, length + 9):
            close(net(**inputs, logits_to_keep=count).logits, every[:, -count:])
        for wanted in (torch.tensor([-1]), torch.tensor([60, 3, 60, -2]), torch.arange(length)):
            close(net(**inputs, logits_to_keep=wanted).logits, every[:, wanted])
        with pytest.raises(IndexError):
            net(**inputs, logits_to_keep=torch.tensor([length]))
        if reducer not in INSIDE:  # which change no column, and leave the argument to the model
            with pytest.raises(InputError, match="logits_to_keep is a number of columns or a vector"):
                net(**inputs, logits_to_keep=torch.tensor([0.5]))


@methods
@torch.no_grad()
def test_hidden_states_tuples_and_labels(reducer):
    net, inputs = deep_model("llava"), with_labels(collate(samples("llava")))
    shifted = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    with full(net, reducer) as handle:
        out = net(**inputs, output_hidden_states=True, output_attentions=True)
        loss, logits, *others = net(**inputs, return_dict=False, output_hidden_states=True)
        states = next(x for x in others if isinstance(x, tuple) and len(x) == len(out.hidden_states))
        close(net(**inputs, shift_labels=shifted).loss, out.loss)
        visible = [visible_columns(inputs, handle.selections)] * 2
    assert torch.equal(loss, out.loss)
    assert torch.equal(logits, out.logits)
    assert all(torch.equal(a, b) for a, b in zip(states, out.hidden_states, strict=True))
    assert all(x.shape[:2] == inputs["input_ids"].shape for x in states)
    for i, columns in enumerate(visible[0]):
        check(states[-1][i], columns)
    close(net.lm_head(states[-1]), out.logits)


@torch.no_grad()
def test_a_configuration_that_asks_for_tuples(monkeypatch):
    net, inputs = deep_model("llava_next"), collate(samples("llava_next"))  # of few models does that work
    with full(net, Uniform(keep=9)):
        expected = net(**inputs).logits
        monkeypatch.setattr(net.config, "return_dict", False)
        logits, *_ = net(**inputs, use_cache=False)
        assert torch.equal(net(**inputs, use_cache=False, return_dict=True).logits, expected)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@torch.no_grad()
def test_hidden_states_of_layers_behind_a_boundary(family):
    net, inputs = deep_model(family), collate(samples(family))
    for first in (False, True):  # transformers puts its hooks on the layers when they are asked for first
        reducer = Chain(Random(keep=16, seed=2), FastV(keep=9, layer=2))
        with full(net, reducer) as handle:
            states = net(**inputs, output_hidden_states=True).hidden_states
            for boundary, row in handle.layers.items():
                for state in states[boundary + 1 :]:
                    for x, visible in zip(state, visible_columns(inputs, row), strict=True):
                        check(x, visible)
        assert all(x.shape[:2] == inputs["input_ids"].shape for x in states), first


@torch.no_grad()
def test_later_passes_on_a_cache():
    net, family = deep_model("llava"), "llava"
    first, turn = samples(family), [sample(2, "image", 4, seed=20 + i) for i in range(3)]
    inputs, then = collate(first), collate(turn)
    mask = torch.cat([inputs["attention_mask"], then["attention_mask"]], dim=1)
    results = {}
    for logits in ("compact", "full"):
        with foveate.attach(net, VisPruner(keep=9), logits=logits) as handle:
            cache = TINIES[family].cache(net)
            net(**inputs, **{CACHE: cache})
            one = net(**{**then, "attention_mask": mask}, **{CACHE: cache}).logits
            selections = handle.selections
            step = torch.full((3, 1), 5)
            longer = torch.nn.functional.pad(mask, (0, 1), value=1)
            two = net(input_ids=step, attention_mask=longer, **{CACHE: cache}).logits
            results[logits] = one, two
    (compact, step), (whole, whole_step) = results["compact"], results["full"]
    assert torch.equal(step, whole_step)
    for x, y, visible in zip(compact, whole, visible_columns(then, selections), strict=True):
        check(y, visible)
        close(y[visible], x)


@methods
def test_generate_is_as_it_was(reducer):
    net, inputs = deep_model("llava"), collate(samples("llava"))
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with foveate.attach(net, reducer):
        expected = net.generate(**inputs, **options)
    with full(net, reducer):
        found = net.generate(**inputs, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))


@torch.no_grad()
def test_packed_rows():
    net = deep_model("llava")
    rows = [sample(3, "image", 5, seed=1), sample(2, "image", 4, seed=2)]
    alone = [collate([row]) for row in rows]
    inputs = {k: torch.cat([one[k] for one in alone], dim=int("ids" in k)) for k in ("input_ids", "pixel_values")}
    inputs["position_ids"] = torch.cat([torch.arange(len(row["ids"])) for row in rows])[None]
    with full(net, Uniform(keep=9)):
        found = net(**inputs, use_cache=False).logits[0].split([len(row["ids"]) for row in rows])
        for x, one in zip(found, alone, strict=True):
            close(x, net(**one).logits[0])


def test_gradients_are_those_of_the_compact_logits():
    net, inputs = deep_model("llava"), with_labels(collate(samples("llava")))
    found = []
    for recipe in ("compact", "full"):
        with foveate.attach(net, Uniform(keep=9), logits=recipe):
            out = net(**inputs)
            labels = inputs["labels"]
            loss = out.loss if recipe == "compact" else LabelSmoother(0.0)(out, labels, shift_labels=True)
            found.append(torch.autograd.grad(loss, net.lm_head.weight)[0])
    close(*found)


def test_what_cannot_be():
    net, inputs = deep_model("llava"), collate(samples("llava"))
    with pytest.raises(InputError, match="logits are 'compact' or 'full', not 'whole'"):
        foveate.attach(net, Uniform(keep=9), logits="whole")
    with pytest.raises(FoveateError, match="logits"):
        foveate.reduce(net, inputs, "uniform", keep=9, logits="full")
    foveate.attach(net, Uniform(keep=9)).detach()


def test_videos_and_several_pictures():
    net, family = deep_model("qwen2_5_vl"), "qwen2_5_vl"
    rows = [sample(3, *VISUALS[family], 5, seed=1), sample(2, VISUALS[family][0], 4, seed=2)]
    with torch.no_grad():
        check_batch(net, Random(keep=5, seed=1), rows, "left")
