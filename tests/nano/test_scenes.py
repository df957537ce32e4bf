"""Scenes: deterministic, disjoint between splits, balanced, and every answer follows from the objects."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from foveate.core.errors import UnknownNameError
from foveate.nano import Scene, SceneObject, scene, scenes
from foveate.nano.drawing import SIDE
from foveate.nano.labels import CENTER, COLOR, DIGIT, IGNORE, KIND, concepts, patch_labels
from foveate.nano.questions import CLEARLY, QUESTION_KINDS, ask
from foveate.nano.scenes import BUCKETS, bucket, generator, plan_scene, render
from foveate.nano.vocabulary import COLORS, KINDS, PLURALS, REGIONS
from training.nano.architecture import WORD_IDS
from training.nano.texts import words_of

SINGULAR = {plural: kind for kind, plural in PLURALS.items()}


@pytest.fixture(scope="module")
def some() -> list[Scene]:
    return list(scenes(seed=3, n=60, split="validation"))


def named(objects: tuple[SceneObject, ...], words: list[str]) -> list[SceneObject]:
    """Objects that bear all kind and colour words of a phrase."""
    kinds = [w for w in words if w in KINDS]
    colors = [w for w in words if w in COLORS]
    return [o for o in objects if o.kind in (kinds or [o.kind]) and o.color in (colors or [o.color])]


def expected(shown: Scene, text: str, kind: str) -> str:
    """The answer found without the code that asked."""
    words = text.rstrip("?").split()
    objects = shown.objects
    if kind == "exist":
        return "yes" if named(objects, words) else "no"
    if kind == "count":
        return str(len(named(objects, [SINGULAR.get(w, w) for w in words])))
    if words[-1] == "background":
        return shown.background
    if kind == "relation":
        middle = next(i for i, w in enumerate(words) if w in ("left", "right", "above", "below"))
        [one], [two] = named(objects, words[:middle]), named(objects, words[middle + 1 :])
        axis = 0 if words[middle] in ("left", "right") else 1
        first, second = (sum(o.box[axis::2]) / 2 for o in (one, two))
        assert abs(first - second) >= CLEARLY
        return "yes" if (first < second) == (words[middle] in ("left", "above")) else "no"
    if kind == "at":
        [found] = [o for o in objects if o.region == words[-1]]
        return found.kind
    [found] = named(objects, words)
    answers = {"color": found.color, "shape": found.kind, "where": found.region, "read": str(found.digit)}
    return answers[kind]


def test_answers_follow_from_objects(some: list[Scene]) -> None:
    for shown in some:
        for question in shown.questions:
            assert question.answer == expected(shown, question.text, question.kind), (question, shown.objects)


def test_same_name_same_scene(some: list[Scene]) -> None:
    again = scene("validation", 3, 5)
    assert again.questions == some[5].questions
    assert again.objects == some[5].objects
    assert np.array_equal(np.asarray(again.image), np.asarray(some[5].image))
    assert [s.index for s in scenes(3, 2, "validation")] == [0, 1]


def test_seeds_and_splits_differ() -> None:
    plans = [plan_scene(split, seed, 0) for split in BUCKETS for seed in range(3)]
    assert len({p.objects for p in plans}) == len(plans)


def test_splits_are_disjoint_by_construction() -> None:
    for split, allowed in BUCKETS.items():
        assert {bucket(plan_scene(split, 1, index)) for index in range(200)} <= set(allowed)
    numbers = [number for allowed in BUCKETS.values() for number in allowed]
    assert sorted(numbers) == list(range(8))


def test_unknown_split() -> None:
    with pytest.raises(UnknownNameError, match="validation"):
        next(scenes(split="valid"))


def test_boxes_are_inside_and_apart(some: list[Scene]) -> None:
    for shown in some:
        assert 1 <= len(shown.objects) <= 10
        for number, one in enumerate(shown.objects):
            left, top, right, bottom = one.box
            assert 0 <= left < right <= SIDE
            assert 0 <= top < bottom <= SIDE
            assert 15 <= right - left <= 44
            for two in shown.objects[:number]:
                apart = two.box
                assert right <= apart[0] or apart[2] <= left or bottom <= apart[1] or apart[3] <= top


def test_answers_are_balanced() -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for index in range(1500):
        plan = plan_scene("train", 9, index)
        for question in ask(plan.objects, plan.background, generator("balance", index)):
            answers[question.kind][question.answer] += 1
    assert set(answers) == set(QUESTION_KINDS)
    most = {kind: max(counted.values()) / counted.total() for kind, counted in answers.items()}
    limits = {"exist": 0.56, "relation": 0.54, "count": 0.34}
    for kind, share in most.items():
        assert share < limits.get(kind, 0.2), (kind, answers[kind])
    assert set(answers["count"]) == set("01234")
    assert set(answers["where"]) == set(REGIONS)


def test_every_word_is_known(some: list[Scene]) -> None:
    for shown in some:
        for question in shown.questions:
            assert {*words_of(question.text), question.answer} <= set(WORD_IDS)


def test_patch_labels_agree_with_objects() -> None:
    plan = plan_scene("train", 4, 2)
    _, owner = render(plan, generator("pixels"))
    labels = patch_labels(plan, owner)
    assert labels[:, CENTER].sum() == len(plan.objects)
    for item in plan.objects:
        x, y = item.center
        row = labels[int(y // 12) * 16 + int(x // 12)]
        assert KINDS[row[KIND] - 1] == item.kind
        assert COLORS[row[COLOR]] == item.color
        assert row[DIGIT] == (IGNORE if item.digit is None else item.digit)
    present = concepts(labels[None])[0]
    assert {KINDS[i] for i in np.flatnonzero(present[: len(KINDS)])} == {o.kind for o in plan.objects}
