"""Plain English questions about a scene, with answers balanced so that a blind guess earns little."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from foveate.nano.objects import SceneObject
from foveate.nano.vocabulary import COLORS, KINDS, PLURALS, RELATIONS, SIGN

QUESTION_KINDS: Final = ("exist", "color", "shape", "where", "at", "count", "relation", "read")
# Trained on, but not asked by ``scenes``: the shipped weights are too unsure of them.
WITHHELD: Final[tuple[str, ...]] = ()
ASKED_KINDS: Final = tuple(kind for kind in QUESTION_KINDS if kind not in WITHHELD)
PER_KIND: Final = {"exist": 3, "color": 2, "shape": 2, "where": 3, "at": 2, "count": 4, "relation": 3, "read": 2}
# How often a question with this answer is kept: scenes offer few answers to counts at all, and mostly 0 and 1.
COLOR_COUNT_KEEP: Final = (0.4, 0.4, 0.5, 0.75, 1.0)
KIND_COUNT_KEEP: Final = (0.16, 0.2, 0.3, 0.5, 1.0)
# Signs are more frequent than any other kind; as an answer they are thinned out.
SIGN_KEEP: Final = 0.25
# Two things that are compared must differ by this many pixels along the axis that is asked about.
CLEARLY: Final = 12


@dataclass(frozen=True)
class Question:
    """A question, its one-word answer and its kind (one of ``QUESTION_KINDS``)."""

    text: str
    answer: str
    kind: str


Asker = Callable[[Sequence[SceneObject], str, np.random.Generator], tuple[str, str] | None]


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _names(objects: Sequence[SceneObject]) -> list[tuple[str, SceneObject]]:
    """Every object with the shortest name that only it bears; objects without one are left out."""
    kinds = Counter(o.kind for o in objects)
    pairs = Counter((o.kind, o.color) for o in objects)
    named = []
    for item in objects:
        if kinds[item.kind] == 1:
            named.append((item.kind, item))
        elif pairs[item.kind, item.color] == 1:
            named.append((f"{item.color} {item.kind}", item))
    return named


def _exist(objects: Sequence[SceneObject], background: str, rng: np.random.Generator) -> tuple[str, str] | None:
    kinds = {o.kind for o in objects}
    colors = {o.color for o in objects}
    pairs = {(o.kind, o.color) for o in objects}
    present = rng.random() < 0.5
    if rng.random() < 0.5:
        options = sorted(kinds) if present else [k for k in KINDS if k not in kinds]
        return f"is there {_article(_pick(rng, options))}?", "yes" if present else "no"
    if present:
        chosen = sorted(pairs)
    else:
        # Both words may well be true of something: only the combination is missing.
        swapped = [(k, c) for k in sorted(kinds) for c in sorted(colors) if (k, c) not in pairs]
        others = [(k, c) for k in sorted(kinds) for c in COLORS if (k, c) not in pairs]
        chosen = swapped if swapped and rng.random() < 0.7 else others
    kind, color = chosen[int(rng.integers(len(chosen)))]
    return f"is there {_article(f'{color} {kind}')}?", "yes" if present else "no"


def _color(objects: Sequence[SceneObject], background: str, rng: np.random.Generator) -> tuple[str, str] | None:
    if rng.random() < 0.2:
        return "what color is the background?", background
    kinds = Counter(o.kind for o in objects)
    single = [o for o in objects if kinds[o.kind] == 1]
    if not single:
        return None
    item = single[int(rng.integers(len(single)))]
    return f"what color is the {item.kind}?", item.color


def _shape(objects: Sequence[SceneObject], background: str, rng: np.random.Generator) -> tuple[str, str] | None:
    colors = Counter(o.color for o in objects)
    single = [o for o in objects if colors[o.color] == 1]
    if not single:
        return None
    item = single[int(rng.integers(len(single)))]
    if item.kind == SIGN and rng.random() > SIGN_KEEP:
        return None
    return f"which object is {item.color}?", item.kind


def _where(objects: Sequence[SceneObject], background: str, rng: np.random.Generator) -> tuple[str, str] | None:
    named = _names(objects)
    if not named:
        return None
    name, item = named[int(rng.integers(len(named)))]
    return f"where is the {name}?", item.region


def _at(objects: Sequence[SceneObject], background: str, rng: np.random.Generator) -> tuple[str, str] | None:
    regions = Counter(o.region for o in objects)
    single = [o for o in objects if regions[o.region] == 1]
    if not single:
        return None
    item = single[int(rng.integers(len(single)))]
    if item.kind == SIGN and rng.random() > SIGN_KEEP:
        return None
    return f"what is in the {item.region}?", item.kind


def _count(objects: Sequence[SceneObject], background: str, rng: np.random.Generator) -> tuple[str, str] | None:
    by_color = rng.random() < 0.5
    tally = Counter(o.color if by_color else o.kind for o in objects)
    target = int(rng.integers(5))
    words = COLORS if by_color else [k for k in KINDS if k != SIGN]
    options = [w for w in words if tally[w] == target]
    keep = COLOR_COUNT_KEEP if by_color else KIND_COUNT_KEEP
    if not options or rng.random() > keep[target]:
        return None
    word = _pick(rng, options)
    text = f"how many objects are {word}?" if by_color else f"what is the number of {PLURALS[word]}?"
    return text, str(target)


def holds(relation: str, first: SceneObject, second: SceneObject) -> bool | None:
    """Whether ``first`` is, for instance, ``left of`` ``second``; None if they are too close to tell."""
    axis = 0 if relation in RELATIONS[:2] else 1
    gap = first.center[axis] - second.center[axis]
    if abs(gap) < CLEARLY:
        return None
    return gap < 0 if relation in ("left of", "above") else gap > 0


def _relation(objects: Sequence[SceneObject], background: str, rng: np.random.Generator) -> tuple[str, str] | None:
    named = _names(objects)
    if len(named) < 2:
        return None
    one, two = (named[int(i)] for i in rng.choice(len(named), 2, replace=False))
    relation = _pick(rng, RELATIONS)
    answer = holds(relation, one[1], two[1])
    if answer is None:
        return None
    # A fair coin decides the answer: swapping the two turns one into the other.
    if answer != (rng.random() < 0.5):
        one, two, answer = two, one, not answer
    return f"is the {one[0]} {relation} the {two[0]}?", "yes" if answer else "no"


def _read(objects: Sequence[SceneObject], background: str, rng: np.random.Generator) -> tuple[str, str] | None:
    signs = [o for o in objects if o.kind == SIGN]
    if not signs:
        return None
    item = signs[int(rng.integers(len(signs)))]
    name = SIGN if len(signs) == 1 else f"{item.color} {SIGN}"
    return f"what number is on the {name}?", str(item.digit)


ASKERS: Final[dict[str, Asker]] = {
    "exist": _exist,
    "color": _color,
    "shape": _shape,
    "where": _where,
    "at": _at,
    "count": _count,
    "relation": _relation,
    "read": _read,
}


def ask(
    objects: Sequence[SceneObject], background: str, rng: np.random.Generator, tries: int = 2
) -> tuple[Question, ...]:
    """Ask distinct questions of every kind that the scene allows.

    Parameters
    ----------
    objects : sequence of SceneObject
        What is shown.
    background : str
        Colour word of the background.
    rng : numpy.random.Generator
        Source of randomness.
    tries : int
        Attempts per wanted question; a failed attempt (ambiguous, or thinned out for balance) leaves a gap.

    Returns
    -------
    tuple of Question
        Usually 10 to 20.
    """
    asked: dict[str, Question] = {}
    for kind, wanted in PER_KIND.items():
        before = len(asked)
        for _ in range(wanted * tries):
            if len(asked) - before == wanted:
                break
            found = ASKERS[kind](objects, background, rng)
            if found is not None:
                asked.setdefault(found[0], Question(*found, kind))
    return tuple(asked.values())
