"""Results of `foveate check` as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foveate.measure.pages import fill, markdown_table
from foveate.measure.units import show_bytes

STAGES = ("first_token", "vision", "select", "prefill", "decode")


def write_report(results: Sequence[Path], page: Path) -> None:
    """Put `markdown` of each result into a page, between markers that are named as its file is."""
    fill(page, {path.stem: markdown(json.loads(path.read_text(encoding="utf-8"))) for path in results})


def markdown(result: Mapping[str, Any]) -> str:
    """Return the command, the verdicts, the selection times and the arms of a result."""
    config, verdicts = result["config"], result["verdicts"]
    about = (
        f"{config['class']}, {config['layers']} layers, {config['dtype']}, attention `{config['attention']}`, on "
        f"{result['machine']['processor'] if config['device'] == 'cpu' else result['machine']['device']}; torch "
        f"{result['versions']['torch']}, transformers {result['versions']['transformers']}; {config['seconds']:,.0f} s."
    )
    rows = [[v["check"], v["verdict"], v["said"]] for v in verdicts]
    parts = [f"`{result['command']}`", about, markdown_table(["check", "verdict", "what was found"], rows)]
    parts += [_selections(v["rows"]) for v in verdicts if "rows" in v]
    parts += [f"{v['check']}: medians in milliseconds.\n\n{_arms(v['arms'])}" for v in verdicts if "arms" in v]
    return "\n\n".join(parts)


def _selections(rows: Sequence[Mapping[str, Any]]) -> str:
    sizes = list(dict.fromkeys(row["tokens"] for row in rows))
    lines = []
    for name in sorted({row["method"] for row in rows}):
        own = {row["tokens"]: row for row in rows if row["method"] == name}
        lines.append([f"`{name}`", *(_selection(own[size]) for size in sizes)])
    head = ["selection, ms (peak)", *(f"{size:,} tokens" for size in sizes)]
    return markdown_table(head, lines)


def _selection(row: Mapping[str, Any]) -> str:
    if "median_ms" not in row:
        return str(row["verdict"])
    return f"{row['median_ms']:,.1f} ({show_bytes(row['peak_bytes'])})"


def _arms(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["arm", "tokens", *(stage.replace("_", " ") for stage in STAGES), "peak memory", "KV cache"]
    lines = []
    for row in rows:
        times = (f"{row['time'][stage]['median_ms']:,.1f}" for stage in STAGES)
        sizes = (show_bytes(row["peak_bytes"]["total"]), show_bytes(row["kv_bytes"]))
        lines.append([row["arm"], f"{row['tokens']:,g}", *times, *sizes])
    return markdown_table(head, lines)
