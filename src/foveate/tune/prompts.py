"""The user's own prompts: a file of JSON lines, and the order in which they are asked."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.core.errors import InputError


@dataclass(frozen=True)
class Prompt:
    """A question about images.

    Attributes
    ----------
    line
        Where it stands in its file, from 1.
    images
        Image files.
    question
        The text.
    answer
        The right answer, if it is known.
    """

    line: int
    images: tuple[Path, ...]
    question: str
    answer: str | None


def read_prompts(path: Path) -> list[Prompt]:
    """Read prompts from a file with one JSON object per line; blank lines are skipped.

    An object has ``"question"``, ``"image"`` (a path) or ``"images"`` (a list of paths), and optionally ``"answer"``;
    other keys are left alone. Paths are relative to the folder of the file.

    Raises
    ------
    InputError
        If the file cannot be read or a line is no prompt; the message names the line. Also if some lines have answers
        and others none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read prompts from {str(path)!r}: {error}") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                prompts.append(_prompt(number, line, path.parent))
            except ValueError as error:
                raise InputError(f"line {number} of {str(path)!r} {error}") from error
    if not prompts:
        raise InputError(f'no prompts in {str(path)!r}: write lines such as {{"image": "a.png", "question": "..."}}')
    first = prompts[0]
    for prompt in prompts:
        if (prompt.answer is None) != (first.answer is None):
            has, lacks = (first, prompt) if prompt.answer is None else (prompt, first)
            raise InputError(
                f"line {has.line} of {str(path)!r} has an answer and line {lacks.line} has none: give all lines an "
                "answer, or none"
            )
    return prompts


def _prompt(number: int, line: str, folder: Path) -> Prompt:
    try:
        data: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is no JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(data, dict):
        raise ValueError(f"is no object with the keys image, question: {line.strip()[:60]}")
    if ("image" in data) == ("images" in data):
        raise ValueError('needs either "image", a path, or "images", a list of paths')
    names = data["images"] if "images" in data else [data["image"]]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"names no image files: {names!r}")
    images = tuple(folder / name for name in names)
    for image in images:
        if not image.is_file():
            raise ValueError(f"names the image {str(image)!r}, which does not exist")
    question, answer = data.get("question"), data.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise ValueError('needs a "question", which is a text')
    if answer is not None and (not isinstance(answer, str) or not answer.strip()):
        raise ValueError(f'has an "answer" that is no text: {answer!r}')
    return Prompt(number, images, question, answer)


def ordered(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    """Return prompts in a random order in which every image is asked about once before one is asked about again."""
    draw = random.Random(seed)
    shuffled = draw.sample(list(prompts), len(prompts))
    turns: dict[tuple[Path, ...], int] = {}
    ranked = []
    for prompt in shuffled:
        turn = turns.get(prompt.images, 0)
        turns[prompt.images] = turn + 1
        ranked.append((turn, prompt))
    return [prompt for _, prompt in sorted(ranked, key=lambda pair: pair[0])]


def same_text(one: str, other: str) -> bool:
    """Return whether an answer is the right one: case, spaces and a closing period do not count."""
    first, second = (" ".join(text.split()).removesuffix(".").casefold() for text in (one, other))
    return first == second
