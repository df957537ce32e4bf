"""The command that prints which methods run on which families."""

from __future__ import annotations

from foveate.cli.tools import Json, guarded, print_json


@guarded
def table(as_json: Json = False) -> None:
    """Print which methods run on which families, as the markdown page docs/compatibility.md."""
    from foveate.cli import compatibility

    if as_json:
        print_json(compatibility.table())
    else:
        print(compatibility.page(), end="")
