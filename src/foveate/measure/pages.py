"""Markdown pages that show results: tables, and their places between marker lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from foveate.core.errors import FoveateError


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(page: Path, texts: Mapping[str, str]) -> None:
    """Put texts between their markers in a Markdown page.

    Parameters
    ----------
    page
        Has a pair of lines ``<!-- NAME -->`` and ``<!-- /NAME -->`` for each text.
    texts
        By name.

    Raises
    ------
    FoveateError
        If the page has no place for one of the texts.
    """
    shown = page.read_text(encoding="utf-8")
    for name, text in texts.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, opened, rest = shown.partition(f"{start}\n")
        _, closed, after = rest.partition(end)
        if not (opened and closed):
            raise FoveateError(f"{page} has no place for {name!r}: it needs the lines {start} and {end}")
        shown = f"{before}{start}\n{text}\n{end}{after}"
    page.write_text(shown, encoding="utf-8")
