"""The rows of a search on disk, so that an interrupted one goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from foveate.core.errors import InputError
from foveate.tune.prompts import Prompt


class Journal:
    """A file of JSON lines: first the settings of the search, then a row for each prompt that was asked.

    Parameters
    ----------
    path
        The file; made if it does not exist.
    settings
        What the rows depend on. A file of other settings is refused.

    Raises
    ------
    InputError
        If the file holds another search, or cannot be read or written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path, self._rows = path, list[dict[str, Any]]()
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
            whole = [line for line in lines if line.endswith("\n")]  # the last one may have been cut off
            if whole and json.loads(whole[0]) != settings:
                raise InputError(
                    f"{str(path)!r} holds a search with other settings: choose another folder with --out, or delete it"
                )
            self._rows = [json.loads(line) for line in whole[1:]]
            path.write_text("".join(whole) or json.dumps(settings) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot use {str(path)!r}: {error.strerror}") from error
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{str(path)!r} is no journal of a search: {error}") from error

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int, prompt: Prompt, names: Iterable[str]) -> dict[str, Any] | None:
        """Return the row of a prompt and some candidates, if it is there."""
        if index >= len(self._rows):
            return None
        row = self._rows[index]
        if row.get("line") != prompt.line or set(row.get("arms", ())) != set(names):
            raise InputError(f"{str(self.path)!r} is damaged at line {index + 2}: delete it and search anew")
        return row

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to the file."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {str(self.path)!r}: {error.strerror}") from error
