"""Accuracy of a model on scenes under many conditions at once, with errors clustered by image."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foveate.engines.hf import Settings, apply, decide, look, select
from foveate.families import family_of
from foveate.nano.questions import ASKED_KINDS, QUESTION_KINDS, Question, ask
from foveate.nano.scenes import Scene, generator, plan_scene
from foveate.reducer import Reducer, identity

PROMPT: Final = "<image>"


@dataclass(frozen=True)
class Condition:
    """One way to run the model.

    Attributes
    ----------
    name : str
        Key of the result.
    reducer : Reducer or None
        None keeps every token.
    positions : str
        ``"original"`` or ``"compact"``.
    wrong_image : bool
        Ask each scene's questions about the scene before it: what can be answered without seeing.
    """

    name: str
    reducer: Reducer | None = None
    positions: Literal["original", "compact"] = "original"
    wrong_image: bool = False


@dataclass(frozen=True)
class Tally:
    """Right answers and questions per image and kind, int64 ``[images, kinds]`` each."""

    right: NDArray[np.int64]
    asked: NDArray[np.int64]

    def of(self, kind: str | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Right answers and questions per image, ``[images]``, of one kind or of all."""
        columns = slice(None) if kind is None else [QUESTION_KINDS.index(kind)]
        return self.right[:, columns].sum(1), self.asked[:, columns].sum(1)

    def share(self, kind: str | None = None) -> dict[str, float]:
        """Accuracy in percent, its standard error clustered by image, and the number of questions."""
        right, asked = self.of(kind)
        return _clustered(right, asked)

    def summary(self) -> dict[str, Any]:
        """Accuracy of all kinds together and of each, in percent."""
        return {"all": self.share(), **{kind: self.share(kind) for kind in ASKED_KINDS}}


def _clustered(right: NDArray[Any], asked: NDArray[np.int64]) -> dict[str, float]:
    total = max(int(asked.sum()), 1)
    mean = right.sum() / total
    images = len(asked)
    error = np.sqrt(((right - mean * asked) ** 2).sum() * images / max(images - 1, 1)) / total
    return {"accuracy": round(100 * float(mean), 2), "error": round(100 * float(error), 2), "questions": total}


def difference(one: Tally, other: Tally) -> dict[str, float]:
    """Paired difference of two conditions in points, with its standard error clustered by image."""
    (first, asked), (second, _) = one.of(), other.of()
    found = _clustered(first - second, asked)
    return {"points": found["accuracy"], "error": found["error"]}


def pooled(tallies: Sequence[Tally]) -> Tally:
    """Several draws of one random condition as one; an image's questions of all draws stay one cluster."""
    return Tally(sum(t.right for t in tallies), sum(t.asked for t in tallies))  # type: ignore[arg-type]


class Runner:
    """Answers questions with work shared: the tower runs once per image, the visual prefix once per condition.

    Parameters
    ----------
    model
        A LLaVA-type model and its processor, such as ``foveate.nano.load()`` returns.
    processor
        See ``model``.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor, self.family = model, processor, family_of(model)

    def look(self, image: Any, reducers: Iterable[Reducer]) -> tuple[dict[str, Any], Any]:
        """Encode an image once, with every probe that one of the reducers needs that do not change this pass."""
        inputs = dict(self.processor(images=image, text=PROMPT, return_tensors="pt").to(self.model.device))
        spans = self.family.spans(self.model, inputs)
        sharing = [reducer for reducer in reducers if reducer.stage != "encoder"]
        return inputs, look(self.model, self.family, inputs, spans, sharing)

    def prefix(self, inputs: Mapping[str, Any], tokens: Any, condition: Condition) -> tuple[Any, int]:
        """Run the visual prefix; returns its key-value cache and the position of the first word after it."""
        selection, embeds = self._kept(inputs, tokens, condition)
        reduced = apply(self.model, self.family, inputs, tokens.spans, selection, embeds, condition.positions)
        cache = self.model(**reduced, use_cache=True, logits_to_keep=1).past_key_values
        full = inputs["input_ids"].shape[1]
        return cache, full if condition.positions == "original" else int(reduced["input_ids"].shape[1])

    def _kept(self, inputs: Mapping[str, Any], tokens: Any, condition: Condition) -> tuple[Any, list[Tensor]]:
        """Selection and embeddings under a condition; only methods that change pixels or encoder encode again."""
        reducer = condition.reducer
        if reducer is None:
            selection = identity(tokens.spans)
            return selection, self.family.embed(self.model, tokens, selection, None)
        settings = Settings(reducer, condition.positions)
        if reducer.stage in ("pixels", "encoder"):
            selection, embeds, _ = select(self.model, self.family, inputs, tokens.spans, settings)
            return selection, embeds
        selection = decide(tokens, settings)
        return selection, self.family.embed(self.model, tokens, selection, reducer.merges)

    def answer(self, cache: Any, start: int, questions: Sequence[Question]) -> list[str]:
        """First generated word of each question, all of them batched behind one prefix."""
        texts = [self.processor.tokenizer(q.text, add_special_tokens=False)["input_ids"] for q in questions]
        longest = max(map(len, texts))
        pad = self.processor.tokenizer.pad_token_id
        ids = torch.tensor([text + [pad] * (longest - len(text)) for text in texts], device=self.model.device)
        positions = (start + torch.arange(longest, device=ids.device)).expand(len(ids), -1)
        seen = cache.get_seq_length()
        cache.batch_repeat_interleave(len(ids))
        mask = torch.ones(len(ids), seen + longest, dtype=torch.int64, device=ids.device)
        # Padding is on the right, where a causal model does not look.
        logits = self.model(
            input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        ).logits
        ends = torch.tensor([len(text) - 1 for text in texts], device=ids.device)
        words: Tensor = logits[torch.arange(len(ids), device=ids.device), ends].argmax(-1)
        return [str(word) for word in self.processor.tokenizer.convert_ids_to_tokens(words.tolist())]


@torch.inference_mode()
def evaluate(
    model: Any,
    processor: Any,
    scenes: Sequence[Scene] | Iterable[Scene],
    conditions: Sequence[Condition],
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tally]:
    """Answer every question of every scene under every condition.

    A reducer with a ``seed`` gets another one for each image; otherwise it would keep the same places everywhere.

    Parameters
    ----------
    model, processor
        From ``foveate.nano.load()``.
    scenes : iterable of Scene
        From ``foveate.nano.scenes``.
    conditions : sequence of Condition
        How to run the model; names must differ.
    progress : callable, optional
        Called with the number of scenes done.

    Returns
    -------
    dict of Tally
        By condition name.
    """
    runner = Runner(model, processor)
    right: dict[str, list[NDArray[np.int64]]] = defaultdict(list)
    asked: dict[str, list[NDArray[np.int64]]] = defaultdict(list)
    before: Scene | None = None
    for done, scene in enumerate(scenes):
        inputs, tokens = runner.look(scene.image, [c.reducer for c in conditions if c.reducer is not None])
        for condition in conditions:
            subject = before if condition.wrong_image else scene
            if subject is None or not subject.questions:
                continue
            cache, start = runner.prefix(inputs, tokens, _with_own_seed(condition, scene.index))
            answers = runner.answer(cache, start, subject.questions)
            counts = np.zeros((2, len(QUESTION_KINDS)), np.int64)
            for question, answer in zip(subject.questions, answers, strict=True):
                column = QUESTION_KINDS.index(question.kind)
                counts[:, column] += (question.answer == answer, 1)
            right[condition.name].append(counts[0])
            asked[condition.name].append(counts[1])
        before = scene
        if progress is not None:
            progress(done + 1)
    return {name: Tally(np.stack(right[name]), np.stack(asked[name])) for name in right}


def _with_own_seed(condition: Condition, index: int) -> Condition:
    reducer = condition.reducer
    if reducer is None or "seed" not in {field.name for field in fields(reducer)}:
        return condition
    return replace(condition, reducer=replace(reducer, seed=reducer.seed * 100_003 + index))  # type: ignore[call-arg,attr-defined]


def question_prior(scenes: Iterable[Scene], seed: int = 0, count: int = 12000) -> Tally:
    """What the most frequent training answer to each exact question text would score: a blind level.

    Parameters
    ----------
    scenes : iterable of Scene
        Whose questions to answer.
    seed, count : int
        Which training scenes to learn from.

    Returns
    -------
    Tally
        As of a model.
    """
    texts: dict[str, Counter[str]] = defaultdict(Counter)
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(count):
        plan = plan_scene("train", seed, index)
        for question in ask(plan.objects, plan.background, generator("train", seed, index, "questions")):
            texts[question.text][question.answer] += 1
            kinds[question.kind][question.answer] += 1
    rows = []
    for scene in scenes:
        counts = np.zeros((2, len(QUESTION_KINDS)), np.int64)
        for question in scene.questions:
            known = texts.get(question.text) or kinds[question.kind]
            guess = known.most_common(1)[0][0] if known else ""
            counts[:, QUESTION_KINDS.index(question.kind)] += (guess == question.answer, 1)
        rows.append(counts)
    table = np.stack(rows)
    return Tally(table[:, 0], table[:, 1])


@torch.inference_mode()
def seconds_per_question(model: Any, processor: Any, scenes: Iterable[Scene], threads: int = 1) -> dict[str, float]:
    """Median and 90th percentile of one plain ``generate`` call, image included, on so many threads.

    Returns
    -------
    dict of float
        Seconds, and the number of calls.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    times = []
    try:
        for scene in scenes:
            question = scene.questions[0]
            started = time.perf_counter()
            inputs = processor(images=scene.image, text=f"{PROMPT} {question.text}", return_tensors="pt")
            model.generate(**inputs)
            times.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    timed = np.asarray(times[2:])
    return {
        "median": round(float(np.median(timed)), 4),
        "p90": round(float(np.quantile(timed, 0.9)), 4),
        "calls": len(timed),
        "threads": threads,
    }
