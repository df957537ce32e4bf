"""A comparison as one HTML page that needs nothing else: pictures inlined, a slider over the budgets."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.colors import to_hex
from PIL import Image

from foveate.core.errors import InputError
from foveate.measure.units import show_bytes, show_flops, show_time
from foveate.viz.comparison import Comparison
from foveate.viz.fate import hue
from foveate.viz.panels import Panel, edges, grid_of
from foveate.viz.sheet import steps

_LONGEST = 1280


def page(comparison: Comparison) -> str:
    """Return the HTML text of a comparison.

    The page draws the tokens itself from the selections, so each picture is in it once. It asks for nothing over the
    network and stores nothing. Without JavaScript its table of answers and costs is still there.
    """
    environment = Environment(
        loader=PackageLoader("foveate.viz", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    data = comparison.to_dict()
    rows = [_figures("unpruned", "", data["unpruned"])]
    rows += [_figures(m["name"], arm["budget"], arm) for m in data["methods"] for arm in m["arms"]]
    for method in data["methods"]:
        for arm in method["arms"]:
            arm["figures"] = _figures(method["name"], arm["budget"], arm)
    layered = any(arm.equivalent != arm.kept for arms in comparison.arms.values() for arm in arms)
    data["panels"] = [_panel(panel) for panel in comparison.panels]
    data["colors"] = {
        "groups": [to_hex(hue(i)) for i in range(1 + _most_groups(data))],
        "steps": steps(len(comparison.budgets)),
        "heat": [to_hex(color) for color in matplotlib.colormaps["inferno"](np.linspace(0, 1, 64))],
    }
    return environment.get_template("page.html.j2").render(data=data, rows=rows, layered=layered)


def write_page(path: Path, comparison: Comparison) -> None:
    """Write what `page` returns to a file."""
    try:
        path.write_text(page(comparison), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror}") from error


def _most_groups(data: dict[str, Any]) -> int:
    groups = (max(row) for method in data["methods"] for arm in method["arms"] for row in arm["shared"])
    return max(groups, default=0)


def _figures(method: str, budget: str, arm: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of an arm with units, as the page shows them."""
    seconds = arm["seconds"]
    return {
        "method": method, "budget": budget, "answer": arm["answer"], "same": arm.get("same_answer"),
        "tokens": f"{arm['tokens']:,}", "mean": f"{arm['equivalent_tokens']:,.1f}",
        "flops": "unknown" if arm["flops"] is None else show_flops(arm["flops"]),
        "kv": show_bytes(arm["kv_bytes"]),
        "first": show_time(seconds["total"] - seconds["decode"]), "total": show_time(seconds["total"]),
    }  # fmt: skip


def _panel(panel: Panel) -> dict[str, Any]:
    """Return the picture as a data URI, and for each token ``[position, row, column, left, top, width, height]``."""
    picture = panel.picture.convert("RGB")
    picture.thumbnail((_LONGEST, _LONGEST), Image.Resampling.LANCZOS)
    cells = []
    for crop in panel.crops:
        y, x = (axis.tolist() for axis in edges(crop, picture.height, picture.width))
        rows, columns = grid_of(crop)
        places = [(r, c) for r in range(rows) for c in range(columns)]
        for position, (r, c) in zip(crop.index.tolist(), places, strict=True):
            cells.append([position, r + 1, c + 1, x[c], y[r], x[c + 1] - x[c], y[r + 1] - y[r]])
    return {
        "label": panel.label, "span": panel.span, "width": picture.width, "height": picture.height,
        "picture": _data_uri(picture), "cells": cells,
    }  # fmt: skip


def _data_uri(picture: Image.Image) -> str:
    """Return a picture as PNG or JPEG, whichever is smaller, for the page itself."""
    files = []
    for kind, settings in (("png", {"optimize": True}), ("jpeg", {"quality": 90})):
        file = io.BytesIO()
        picture.save(file, kind, **settings)
        files.append((kind, file.getvalue()))
    kind, content = min(files, key=lambda entry: len(entry[1]))
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
