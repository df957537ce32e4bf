"""Pages of the documentation that show results: Markdown between pairs of marker lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from foveate.errors import FoveateError


def fill(page: Path, parts: Mapping[str, str]) -> None:
    """Put each part, a piece of Markdown, between the lines ``<!-- NAME -->`` and ``<!-- /NAME -->`` of a page.

    Raises
    ------
    FoveateError
        If the page has no place for one of the parts.
    """
    text = page.read_text(encoding="utf-8")
    for name, shown in parts.items():
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not (start and end):
            raise FoveateError(
                f"{page} has no place for {name!r}: it needs the lines <!-- {name} --> and <!-- /{name} -->"
            )
        text = f"{before}{start}{shown}\n{end}{after}"
    page.write_text(text, encoding="utf-8")
