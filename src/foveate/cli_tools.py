"""What the commands share: errors, JSON, folders."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

from foveate.errors import FoveateError, InputError

P = ParamSpec("P")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Turn foveate's own errors into one line on standard error and exit code 2."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except FoveateError as error:
            print("error:", " ".join(str(error).split()), file=sys.stderr)
            raise typer.Exit(2) from None

    return wrapped


def print_json(data: Any) -> None:
    """Print the one document that ``--json`` promises."""
    print(json.dumps(data, indent=2))


def make_folder(out: Path | None, name: str) -> Path:
    """Make the folder for results: the one asked for, or a fresh one called `name` under ``runs``."""
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            return out
        number = 1
        while True:
            folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                number += 1
    except OSError as error:
        raise InputError(f"cannot make the folder {str(out or 'runs')!r}: {error.strerror}") from error


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file, and its folder if need be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror}") from error
