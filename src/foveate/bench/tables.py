"""Results of `foveate bench model` as Markdown, held against what the library promises, and of `--growth`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foveate.bench.growth import growth_table
from foveate.measure.pages import fill
from foveate.measure.timing import STAGES
from foveate.measure.units import show_bytes

TARGETS: tuple[tuple[str, tuple[str, ...], str, float], ...] = (
    ("first token, attached at ratio 1 / unattached", ("attached_at_ratio_1",), "at most", 1.01),
    ("vision with the probe / same layers without", ("probes",), "at most", 1.02),
    ("vision with the probe / unpruned", ("vision",), "at most", 1.0),
    ("first token / oracle's", ("first_token_of_oracle",), "at most", 1.05),
    ("prefill time saved / predicted by FLOPs", ("prefill", "reached"), "at least", 0.9),
    ("vision and selection, naive way / method", ("naive", "vision_and_select"), "at least", 1.12),
    ("prefill beyond the oracle's / unpruned prefill", ("prefill_beyond_oracle",), "at most", 0.03),
)
"""What is promised: words, where `comparisons` has it, and the limit."""


def write_report(results: Sequence[Path], page: Path) -> None:
    """Put each result into a page, between markers that are named as its file is."""
    read = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in results}
    fill(page, {name: markdown(found) if "arms" in found else growth_table(found) for name, found in read.items()})


def markdown(result: Mapping[str, Any]) -> str:
    """Return the command, a table of the arms, one of the targets, and the break-even as Markdown."""
    config, found = result["config"], result["comparisons"]
    about = (
        f"{config['visual_tokens']:,} visual and {config['text_tokens']} text tokens, {config['layers']} layers of the "
        f"LLM, {config['dtype']}, attention `{config['attention']}`, {result['machine']['processor']}, "
        f"{result['machine']['threads']} thread(s), {config['turns']} turns, {_CLOCKS[config['clock']]}."
    )
    facts = _facts(found, config["answer_tokens"] > 1)
    parts = [f"`{result['command']}`", about, _arms(result["arms"]), _targets(found), "\n".join(facts)]
    return "\n\n".join(part for part in parts if part)


_CLOCKS = {"wall": "wall-clock time", "cpu": "processor time"}


def _arms(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"| arm | tokens | {' | '.join(STAGES)} | first token (p90) | peak memory: before the LLM, in all | KV cache |",
        "|---|" + "--:|" * (len(STAGES) + 4),
    ]
    for row in rows:
        cells = [f"{row['time'][stage]['median_ms']:,.0f}" for stage in STAGES]
        first, peaks = row["time"]["first_token"], row["peak_bytes"]
        before = show_bytes(max(peaks["vision"], peaks["select"]))
        lines.append(
            f"| {row['arm']} | {row['tokens']:,g} | {' | '.join(cells)} | {first['median_ms']:,.0f} "
            f"({first['p90_ms']:,.0f}) | {before}, {show_bytes(peaks['total'])} | {show_bytes(row['kv_bytes'])} |"
        )
    return "\n".join([*lines, "", "Times are medians in milliseconds."])


def _targets(found: Mapping[str, Any]) -> str:
    lines = ["| | target | measured | |", "|---|--:|--:|---|"]
    for words, keys, bound, limit in TARGETS:
        value: Any = found
        for key in keys:
            value = value.get(key, {})
        if isinstance(value, float):
            holds = value <= limit if bound == "at most" else value >= limit
            lines.append(f"| {words} | {bound} {limit} | {value:.3f} | {'holds' if holds else 'missed'} |")
    return "\n".join(lines)


def _facts(found: Mapping[str, Any], decoded: bool) -> list[str]:
    lines = []
    if "predicted" in (prefill := found.get("prefill", {})):
        lines.append(
            f"- First token {1 - found['first_token']:.1%} earlier than unpruned; prefill {prefill['saved']:.1%} "
            f"shorter, where FLOPs predict {prefill['predicted']:.1%}."
        )
    if "naive" in found:
        peaks = found["naive"]["peak_bytes"]
        lines.append(
            f"- Peak memory of vision and selection: {show_bytes(peaks['method'])}, the naive way "
            f"{show_bytes(peaks['naive'])}."
        )
    if "break_even" in found:
        even = {key: "never" if n is None else f"{n:g}" for key, n in found["break_even"].items()}
        lines.append(
            f"- Break-even: {even['dropped_tokens']} dropped tokens against the unpruned model, "
            f"{even['dropped_tokens_for_deciding']} to pay for probes, decision and compaction"
            + (f"; answers from {even['answer_tokens']} tokens on." if decoded else ", of the first token's time.")
        )
    return lines
