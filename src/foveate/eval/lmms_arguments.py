"""What runs of lmms-eval share, however they are started: the method by words, and where the numbers come from."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from foveate.core.budget import parse_keep
from foveate.core.errors import InputError
from foveate.core.reducer import Method
from foveate.measure.provenance import machine, versions
from foveate.registry import load_reducer


def make_reducer(method: str | Path | Method | None, keep: Any = None, **config: Any) -> Method | None:
    """Return the reducer that words of a command line describe, or `None` for the unpruned model.

    Parameters
    ----------
    method
        A reducer, the name of one, or a JSON file that `Method.save` wrote.
    keep
        The budget, also as text such as ``"64"``, ``"0.25"`` or ``"coverage:0.9"``.
    """
    if method is None:
        check_unreduced(None, **({} if keep is None else {"keep": True}), **dict.fromkeys(config, True))
        return None
    if keep is not None:
        config["keep"] = parse_keep(str(keep)) if isinstance(keep, str | int | float) else keep
    return load_reducer(method, **config)


def check_unreduced(reducer: Method | None, **given: Any) -> None:
    """Raise `InputError` if something is given, and not zero or false, that says how a method works, without one."""
    if reducer is None and (useless := [name for name, value in given.items() if value]):
        raise InputError(f"{', '.join(useless)} has no meaning without a method, as nothing is reduced: name one")


def provenance() -> dict[str, Any]:
    """Return the versions, the commit and the machine of a run."""
    return {"versions": {**versions(), "lmms_eval": importlib.metadata.version("lmms_eval")}, "machine": machine()}
