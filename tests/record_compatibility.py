"""Measures what docs/compatibility.md says of callers: ``python tests/record_compatibility.py [family ...]``.

Writes `results/compatibility-callers.json`, where each version of transformers has a part of its own. What differs from
what is due raises, and is to be mended: a cell is "yes" or what foveate says where it refuses.
"""

import json
import sys
import time
import warnings
from pathlib import Path

import accelerate
import torch
import transformers

from callers import COLUMNS, PLACES, cell, method_of
from foveate.core.checks import checked_values
from tiny import FAMILIES

OUT = Path(__file__).parents[1] / "results" / "compatibility-callers.json"


def row(family: str) -> dict[str, dict[str, str]]:
    """Return what is found of a family, by place and column."""
    return {
        place: {"method": method_of(family, place).name, **{column: cell(column, family, place) for column in COLUMNS}}
        for place in PLACES
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    result, start = json.loads(OUT.read_text()) if OUT.exists() else {}, time.perf_counter()
    part = result.setdefault(transformers.__version__, {"families": {}})
    with checked_values():
        for family in sys.argv[1:] or FAMILIES:
            part["families"][family] = row(family)
    part["families"] = {family: part["families"][family] for family in FAMILIES if family in part["families"]}
    part["versions"] = {"torch": torch.__version__, "accelerate": accelerate.__version__}
    if not sys.argv[1:]:
        part["seconds"] = round(time.perf_counter() - start)
    OUT.write_text(json.dumps(result, indent=1) + "\n")
