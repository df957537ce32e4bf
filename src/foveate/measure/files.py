"""Files that results go to."""

from __future__ import annotations

from pathlib import Path

from foveate.core.errors import InputError


def write_text(path: Path, text: str) -> None:
    """Write a file, and its folder if need be.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror}") from error
