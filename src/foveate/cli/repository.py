"""What the repository has and the wheel has not: the one place that knows where."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from foveate.core.errors import FoveateError

_ROOT = Path(__file__).resolve().parents[3]


def training_of_nano(module: str) -> Any:
    """Import a module of ``training/nano``, which lies beside ``src`` where foveate runs from a clone.

    Raises
    ------
    FoveateError
        If foveate was installed without its repository.
    """
    if not (_ROOT / "training" / "nano").is_dir():
        raise FoveateError(
            "what trains, judges and reports on nano is in foveate's repository, not in this installation: clone it, "
            "run `make setup` there and call .venv/bin/foveate"
        )
    if str(_ROOT) not in sys.path:
        sys.path.insert(0, str(_ROOT))
    return importlib.import_module(f"training.nano.{module}")
