"""The words that nano knows, and what they stand for."""

from __future__ import annotations

from typing import Final

SHAPES: Final = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
ICONS: Final = (
    "house",
    "tree",
    "fish",
    "car",
    "boat",
    "cup",
    "key",
    "umbrella",
    "mushroom",
    "bell",
    "flower",
    "rocket",
)
SIGN: Final = "sign"
KINDS: Final = (*SHAPES, *ICONS, SIGN)
COLORS: Final = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
BACKGROUND_COLORS: Final = ("white", "gray", "black", "brown", "blue", "green", "pink", "yellow")
ALL_COLORS: Final = (*COLORS, "white", "gray", "black")
REGIONS: Final = (
    "top-left",
    "top",
    "top-right",
    "left",
    "center",
    "right",
    "bottom-left",
    "bottom",
    "bottom-right",
)
RELATIONS: Final = ("left of", "right of", "above", "below")
DIGITS: Final = tuple(str(digit) for digit in range(10))
PLURALS: Final = {kind: {"fish": "fishes", "cross": "crosses"}.get(kind, f"{kind}s") for kind in KINDS}

PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
SPECIALS: Final = (PAD, BOS, EOS, UNKNOWN, IMAGE)
GLUE: Final = (
    *("is", "there", "a", "an", "the", "what", "which", "where", "how", "many", "of", "in", "on", "at", "and", "to"),
    *("it", "this", "that", "are", "object", "objects", "color", "shape", "number", "background", "above", "below"),
    *("yes", "no", "no-color"),
)


def vocabulary() -> tuple[str, ...]:
    """All words in the order of their ids; the special tokens come first.

    Returns
    -------
    tuple of str
        Distinct words.
    """
    words = (
        *SPECIALS,
        *KINDS,
        *ALL_COLORS,
        *REGIONS,
        *DIGITS,
        *PLURALS.values(),
        *GLUE,
    )
    return tuple(dict.fromkeys(words))
