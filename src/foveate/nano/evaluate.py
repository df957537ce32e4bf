"""Accuracy of a model on scenes under many conditions at once, with errors clustered by image."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from foveate.nano.questions import ASKED_KINDS, QUESTION_KINDS, Question, ask
from foveate.nano.runner import PROMPT, Condition, Runner, with_own_seed
from foveate.nano.scenes import Scene, generator, plan_scene


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
        return clustered(*self.of(kind))

    def summary(self) -> dict[str, Any]:
        """Accuracy of all kinds together and of each, in percent."""
        return {"all": self.share(), **{kind: self.share(kind) for kind in ASKED_KINDS}}


def clustered(right: NDArray[Any], asked: NDArray[np.int64]) -> dict[str, float]:
    """Share of right answers in percent, its standard error, and the number of questions, of counts per image."""
    total = max(int(asked.sum()), 1)
    mean = right.sum() / total
    images = len(asked)
    error = np.sqrt(((right - mean * asked) ** 2).sum() * images / max(images - 1, 1)) / total
    return {"accuracy": round(100 * float(mean), 2), "error": round(100 * float(error), 2), "questions": total}


def difference(one: Tally, other: Tally) -> dict[str, float]:
    """Paired difference of two conditions in points, with its standard error clustered by image."""
    (first, asked), (second, _) = one.of(), other.of()
    found = clustered(first - second, asked)
    return {"points": found["accuracy"], "error": found["error"]}


def pooled(tallies: Sequence[Tally]) -> Tally:
    """Several draws of one random condition as one; an image's questions of all draws stay one cluster."""
    return Tally(sum(t.right for t in tallies), sum(t.asked for t in tallies))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Asked:
    """What a condition made of one scene's questions.

    Attributes
    ----------
    questions
        In the order of `answers`.
    answers
        One word each.
    kept
        Visual tokens that were left, the mean over the questions.
    """

    questions: Sequence[Question]
    answers: list[str]
    kept: float

    def right(self) -> list[bool]:
        """Return which answers are right."""
        return [question.answer == answer for question, answer in zip(self.questions, self.answers, strict=True)]


@torch.inference_mode()
def ask_all(
    model: Any, processor: Any, scenes: Iterable[Scene], conditions: Sequence[Condition]
) -> Iterator[dict[str, Asked]]:
    """Ask every question of every scene under every condition; the tower runs once per scene for all of them.

    A reducer with a ``seed`` gets another one for each image; otherwise it would keep the same places everywhere.

    Yields
    ------
    dict of Asked
        By condition name, per scene. A condition that has nothing to ask, as the wrong image before the first scene,
        is left out.
    """
    runner = Runner(model, processor)
    before: Scene | None = None
    for scene in scenes:
        inputs, tokens = runner.look(scene.image, [c.reducer for c in conditions if c.reducer is not None])
        found = {}
        for condition in conditions:
            subject = before if condition.wrong_image else scene
            if subject is None or not subject.questions:
                continue
            seeded = with_own_seed(condition, scene.index)
            found[condition.name] = Asked(subject.questions, *runner.ask(inputs, tokens, seeded, subject.questions))
        before = scene
        yield found


def count_kinds(questions: Sequence[Question], of: Sequence[bool]) -> NDArray[np.int64]:
    """Count the questions of each kind that a flag is set for, int64 ``[kinds]``."""
    counts = np.zeros(len(QUESTION_KINDS), np.int64)
    for question, flag in zip(questions, of, strict=True):
        counts[QUESTION_KINDS.index(question.kind)] += flag
    return counts


def evaluate(
    model: Any,
    processor: Any,
    scenes: Sequence[Scene] | Iterable[Scene],
    conditions: Sequence[Condition],
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tally]:
    """Answer every question of every scene under every condition, see `ask_all`.

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
    right: dict[str, list[NDArray[np.int64]]] = defaultdict(list)
    asked: dict[str, list[NDArray[np.int64]]] = defaultdict(list)
    for done, found in enumerate(ask_all(model, processor, scenes, conditions), start=1):
        for name, one in found.items():
            right[name].append(count_kinds(one.questions, one.right()))
            asked[name].append(count_kinds(one.questions, [True] * len(one.questions)))
        if progress is not None:
            progress(done)
    return {name: Tally(np.stack(right[name]), np.stack(asked[name])) for name in right}


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
