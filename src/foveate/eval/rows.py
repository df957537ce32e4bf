"""Answers on disk: lines of JSON, one per condition and block of images."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from foveate.core.errors import InputError


def append(rows: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Add lines to a file, which is made if it does not exist."""
    try:
        rows.parent.mkdir(parents=True, exist_ok=True)
        with rows.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    except OSError as error:
        raise InputError(f"cannot write {str(rows)!r}: {error.strerror}") from error


def read(rows: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Return the lines of a file by condition and first image; a last line that was cut off does not count."""
    if not rows.exists():
        return {}
    text = rows.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        rows.write_text(whole, encoding="utf-8")
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
        return {(line["key"], line["start"]): line for line in lines}
    except (ValueError, TypeError, LookupError) as error:
        raise InputError(f"{str(rows)!r} holds no rows of an evaluation: {error}") from error
