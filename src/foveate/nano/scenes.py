"""Deterministic scenes: images whose objects, boxes, questions and answers are known."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image

from foveate.core.errors import UnknownNameError
from foveate.nano import drawing
from foveate.nano.drawing import SIDE
from foveate.nano.objects import SceneObject
from foveate.nano.questions import WITHHELD, Question, ask
from foveate.nano.vocabulary import BACKGROUND_COLORS, COLORS, ICONS, SHAPES, SIGN

BUCKETS: Final = {"train": (2, 3, 4, 5, 6, 7), "validation": (1,), "test": (0,)}
SMALLEST, LARGEST, SMALLEST_SIGN = 15, 44, 28
MOST_OBJECTS: Final = 10
MOST_ALIKE: Final = 4
_SOLID: Final = [0] * 128 + [255] * 128


@dataclass(frozen=True)
class Plan:
    """What a scene shows, before it is drawn."""

    objects: tuple[SceneObject, ...]
    background: str
    pattern: str
    clutter: int


@dataclass(frozen=True)
class Scene:
    """An image with its objects and questions.

    Attributes
    ----------
    image : PIL.Image.Image
        RGB, 192 x 192 pixels.
    objects : tuple of SceneObject
        What the questions are about.
    background : str
        Colour word of the background.
    questions : tuple of Question
        Plain English questions, their one-word answers and their kinds.
    split, seed, index
        The scene's name: the same three always give the same scene.
    """

    image: Image.Image
    objects: tuple[SceneObject, ...]
    background: str
    questions: tuple[Question, ...]
    split: str
    seed: int
    index: int


def generator(*key: str | int) -> np.random.Generator:
    """Random numbers that depend on the key alone.

    Parameters
    ----------
    *key : str or int
        For instance split, seed, index and the purpose.

    Returns
    -------
    numpy.random.Generator
        A counter-based (Philox) generator.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def bucket(plan: Plan) -> int:
    """Number from 0 to 7 that decides the split a plan may occur in.

    It depends on what is shown where and on nothing else: no seed can bring the same arrangement into two splits.

    Parameters
    ----------
    plan : Plan
        The scene's content.

    Returns
    -------
    int
        0 to 7.
    """
    content = [(o.kind, o.color, o.box, o.digit) for o in plan.objects]
    return hashlib.sha256(repr((content, plan.background)).encode()).digest()[0] % 8


def plan_scene(split: str, seed: int, index: int) -> Plan:
    """Decide what a scene shows.

    Parameters
    ----------
    split : str
        ``"train"``, ``"validation"`` or ``"test"``.
    seed, index : int
        The scene's name within the split.

    Returns
    -------
    Plan
        Objects with their boxes, and the background.
    """
    if split not in BUCKETS:
        raise UnknownNameError(f"split {split!r} is unknown; use one of {', '.join(BUCKETS)}")
    rng = generator(split, seed, index, "plan")
    while True:
        plan = _draw_plan(rng)
        if bucket(plan) in BUCKETS[split]:
            return plan


def _draw_plan(rng: np.random.Generator) -> Plan:
    count = int(rng.integers(1, MOST_OBJECTS + 1))
    kinds, colors = _draw_names(rng, count)
    boxes: list[tuple[int, int, int, int]] = []
    objects: list[SceneObject] = []
    for kind, color in zip(kinds, colors, strict=True):
        smallest = SMALLEST_SIGN if kind == SIGN else SMALLEST
        box = _draw_box(rng, smallest, boxes)
        if box is None:
            continue
        boxes.append(box)
        tilt = 0.12 if kind == SIGN or kind in ICONS else 0.2
        objects.append(
            SceneObject(
                kind,
                color,
                box,
                digit=int(rng.integers(10)) if kind == SIGN else None,
                angle=float(rng.uniform(-tilt, tilt)),
                shade=float(rng.uniform(0.9, 1.08)),
            )
        )
    return Plan(
        tuple(objects),
        BACKGROUND_COLORS[rng.integers(len(BACKGROUND_COLORS))],
        drawing.PATTERNS[rng.integers(len(drawing.PATTERNS))],
        int(rng.integers(0, 13)),
    )


def _draw_names(rng: np.random.Generator, count: int) -> tuple[list[str], list[str]]:
    """Kinds and colours of the objects; some scenes repeat a kind or a colour, so that there is something to count."""
    names: list[list[str]] = []
    for pool in ((*SHAPES, *ICONS), COLORS):
        repeat = (0.0, 0.35, 0.6)[rng.integers(3)]
        chosen: list[str] = []
        while len(chosen) < count:
            again = chosen and rng.random() < repeat
            word = chosen[rng.integers(len(chosen))] if again else pool[rng.integers(len(pool))]
            if chosen.count(word) < MOST_ALIKE:
                chosen.append(word)
        names.append(chosen)
    kinds, colors = names
    signs = int(rng.integers(0, 3))
    for place in range(min(signs, count)):
        if colors[place] not in colors[:place]:
            kinds[place] = SIGN
    return kinds, colors


def _draw_box(
    rng: np.random.Generator, smallest: int, boxes: list[tuple[int, int, int, int]]
) -> tuple[int, int, int, int] | None:
    """A free place whose centre is spread evenly over the 3 x 3 cells, or None if none is found."""
    cell = SIDE / 3
    for attempt in range(40):
        size = int(rng.integers(smallest, max(smallest + 1, LARGEST + 1 - attempt)))
        row, column = rng.integers(3, size=2)
        half = size / 2 + 2
        x, y = (min(max(c * cell + rng.uniform(4, cell - 4), half), SIDE - half) for c in (float(column), float(row)))
        left, top = int(x - size / 2), int(y - size / 2)
        box = (left, top, left + size, top + size)
        if all(box[0] >= b[2] + 3 or b[0] >= box[2] + 3 or box[1] >= b[3] + 3 or b[1] >= box[3] + 3 for b in boxes):
            return box
    return None


def render(plan: Plan, rng: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
    """Draw a plan.

    Parameters
    ----------
    plan : Plan
        What to show.
    rng : numpy.random.Generator
        Source of the background's texture and of the clutter.

    Returns
    -------
    image : PIL.Image.Image
        RGB, 192 x 192 pixels.
    owner : numpy.ndarray
        uint8 ``[192, 192]``: which object a pixel belongs to, counted from 1; 0 is background.
    """
    image = drawing.draw_background(rng, plan.background, plan.pattern)
    drawing.draw_clutter(rng, image, plan.background, plan.clutter)
    owner = Image.new("L", (SIDE, SIDE), 0)
    for number, item in enumerate(plan.objects, start=1):
        red, green, blue = (min(255, round(c * item.shade)) for c in drawing.OBJECT_RGB[item.color])
        size = item.box[2] - item.box[0]
        tile = drawing.draw_object(item.kind, (red, green, blue), size, item.angle, item.digit)
        image.paste(tile.picture, item.box[:2], tile.picture)
        owner.paste(number, item.box[:2], tile.silhouette.point(_SOLID))
    return image, np.asarray(owner)


def scene(split: str, seed: int, index: int) -> Scene:
    """One scene by its name.

    Parameters
    ----------
    split : str
        ``"train"``, ``"validation"`` or ``"test"``.
    seed, index : int
        The scene's name within the split.

    Returns
    -------
    Scene
        Image, objects and questions.
    """
    plan = plan_scene(split, seed, index)
    image, _ = render(plan, generator(split, seed, index, "pixels"))
    questions = ask(plan.objects, plan.background, generator(split, seed, index, "questions"))
    asked = tuple(question for question in questions if question.kind not in WITHHELD)
    return Scene(image, plan.objects, plan.background, asked, split, seed, index)


def scenes(seed: int = 0, n: int = 100, split: str = "validation") -> Iterator[Scene]:
    """Yield scenes with their questions.

    Scene ``i`` does not depend on ``n``, and no arrangement of objects occurs in two splits, whatever the seeds.

    Parameters
    ----------
    seed : int
        Different seeds give different scenes.
    n : int
        How many.
    split : str
        ``"train"``, ``"validation"`` or ``"test"``.

    Yields
    ------
    Scene
        Image, objects, questions.

    Raises
    ------
    UnknownNameError
        If ``split`` is unknown.

    Examples
    --------
    >>> next(scenes(seed=0, n=1, split="validation")).image.size
    (192, 192)
    """
    for index in range(n):
        yield scene(split, seed, index)
