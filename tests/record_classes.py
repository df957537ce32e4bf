"""Measures what `results/compatibility-classes.json` says: ``python tests/record_classes.py [model type ...]``.

Of each image-text class of the installed transformers: the family of its models, or why they are refused; and whether
the prefill that DivPrune and VisPruner leave of two prompts equals that of the stock model from which the dropped
tokens are hidden (as the largest difference between logits), or why they do not run. With ``--docs``, the table of
`docs/families.md` is written anew.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import foveate
from foveate.core.errors import UnsupportedModelError
from foveate.families import family_of_class
from foveate.measure.pages import markdown_table
from hiding import expected
from tiny import TINIES, collate, samples
from tiny_classes import NAMES, VIDEO, batch, build, class_of

ROOT = Path(__file__).parents[1]
OUT, PAGE = ROOT / "results" / "compatibility-classes.json", ROOT / "docs" / "families.md"
METHODS = ("divprune", "vispruner")
NOISE = 1e-4


def named_config(kind: str) -> Any:
    """Return a configuration of a model type that names the placeholders, as those of checkpoints do."""
    try:
        config = CONFIG_MAPPING[kind]()
    except ValueError:  # some versions' encoder-decoders have no defaults
        return SimpleNamespace(model_type=kind)
    if hasattr(config, "image_token_id") and config.image_token_id is None:
        config.image_token_id = VIDEO
    return config


def family_name(kind: str) -> str:
    """Return the family of the models of a type, by their class and configuration alone."""
    return family_of_class(class_of(kind), named_config(kind)).name


def instance(kind: str, family: str) -> tuple[Any, dict[str, Any]]:
    tiny = TINIES.get(family)
    # Gemma 3's sliding window counts kept tokens: the tiny one is wider than any prompt here, the tests' is not.
    if tiny is not None and tiny.original.config.model_type == kind != "gemma3":
        return tiny.model("sdpa", torch.float32), collate(samples(family))
    net = build(kind)
    return net, batch(net)


@torch.no_grad()
def difference(net: Any, inputs: dict[str, Any], method: str) -> float:
    reduced = foveate.reduce(net, inputs, method, keep=0.5, positions="original")
    logits = net(**reduced).logits[:, -1]
    found = float((logits - expected(net, inputs, reduced)).abs().max())
    return float(f"{found:.1e}")


def why(error: Exception) -> str:
    """Return the part of an error that a table has room for."""
    text = str(error).strip().splitlines()[0]
    if "attention layers of the vision encoder" in text:
        return "no attention to read"
    for start in ("and this one ", "tells its tokens apart: "):
        text = text.partition(start)[2] or text
    return re.split(r"; |\. |, such as| but it was", text)[0]


def measured(kind: str) -> dict[str, Any]:
    row: dict[str, Any] = {"class": class_of(kind).__name__}
    try:
        row["family"] = family_name(kind)
    except UnsupportedModelError as error:
        return {**row, "refused": why(error)}
    try:
        net, inputs = instance(kind, row["family"])
    except (ImportError, RuntimeError) as error:
        return {**row, "not built": why(error)}
    for method in METHODS:
        try:
            row[method] = difference(net, inputs, method)
        except UnsupportedModelError as error:
            row[method] = why(error)
    return row


def markdown(data: dict[str, Any]) -> str:
    """Return the table of the docs."""
    rows = []
    for kind, row in data["classes"].items():
        if "refused" in row:
            cells = [f"refused: {row['refused']}", "", ""]
        elif "not built" in row:
            cells = [f"`{row['family']}`", f"not run: {row['not built']}", ""]
        else:
            cells = [f"`{row['family']}`", *(_cell(row[method]) for method in METHODS)]
        rows.append([f"`{kind}`", *cells])
    return markdown_table(["model type", "family", *METHODS], rows)


def _cell(found: Any) -> str:
    if isinstance(found, str):
        return found
    return "✓" if found < NOISE else f"off by {found:.1e}"


if __name__ == "__main__":
    kinds = [argument for argument in sys.argv[1:] if argument != "--docs"]
    known = json.loads(OUT.read_text())["classes"] if OUT.exists() else {}
    for kind in kinds or ([] if "--docs" in sys.argv else sorted(NAMES)):
        known[kind] = measured(kind)
        print(kind, known[kind], flush=True)
    data = {"transformers": transformers.__version__, "classes": dict(sorted(known.items()))}
    OUT.write_text(json.dumps(data, indent=1) + "\n")
    shown = re.sub(
        r"(?s)<!-- classes -->.*<!-- /classes -->",
        lambda _: f"<!-- classes -->\n{markdown(data)}\n<!-- /classes -->",
        PAGE.read_text(encoding="utf-8"),
    )
    PAGE.write_text(shown, encoding="utf-8")
