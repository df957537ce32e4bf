"""What a search came to, as plain data and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from foveate.core.reducer import Method
from foveate.measure.provenance import machine, versions
from foveate.measure.units import show_time
from foveate.tune.bounds import drop
from foveate.tune.candidates import CONTROLS
from foveate.tune.prompts import Prompt
from foveate.tune.search import Found, Wish, pareto

HEADER = ("candidate", "prompts", "loss", "at most", "accuracy", "KL", "tokens", "FLOPs", "time")


def findings(
    found: Found, candidates: Mapping[str, Method], left_out: Mapping[str, str], prompts: Sequence[Prompt], wish: Wish
) -> dict[str, Any]:
    """Return the outcome of a search as JSON-compatible data."""
    last = {name: standings[-1] for name, standings in found.standings.items() if standings}
    front = pareto({name: (s.cost(wish.by).value, s.loss.high) for name, s in last.items()})
    best = found.winner or found.closest
    rows = found.rows
    labelled = prompts[0].answer is not None
    return {
        "wish": {
            "max_loss": wish.max_loss, "speedup": wish.speedup, "by": wish.by, "confidence": wish.confidence,
            "text": wish.text,
        },
        "fulfilled": found.winner is not None,
        "winner": found.winner,
        "closest": found.closest,
        "reducer": candidates[found.winner].to_dict() if found.winner else None,
        "prompts": len(prompts),
        "images": len({prompt.images for prompt in prompts}),
        "labelled": labelled,
        "rungs": list(found.rungs),
        "unpruned": {
            "accuracy": round(fmean(row["right"] for row in rows), 6) if labelled else None,
            "seconds": round(median(row["seconds"] for row in rows), 6),
        },
        "front": front,
        "controls": _controls(found, best, prompts, wish) if best else [],
        "candidates": [
            {
                "candidate": name, "method": repr(candidates[name]), "stage": candidates[name].stage,
                "rungs": [standing.to_dict() for standing in standings],
            }
            for name, standings in found.standings.items()
        ],
        "failed": found.failed,
        "left_out": dict(left_out),
        "versions": versions(),
        "machine": machine(),
    }  # fmt: skip


def _controls(found: Found, best: str, prompts: Sequence[Prompt], wish: Wish) -> list[dict[str, Any]]:
    """Hold the best candidate against each of its controls, prompt by prompt."""
    key = "same" if prompts[0].answer is None else "right"
    compared = []
    for control in found.controls:
        if control in found.failed:
            continue
        pairs = [(row["arms"][best][key], row["arms"][control][key]) for row in found.rows]
        images = [prompt.images for prompt in prompts[: len(pairs)]]
        ahead = drop([ours - theirs for ours, theirs in pairs], images, wish.confidence)
        compared.append({
            "control": control, "prompts": len(pairs), "ahead": ahead.to_dict(),
            "loss": found.standings[control][-1].loss.to_dict(),
        })  # fmt: skip
    return compared


def table(result: Mapping[str, Any]) -> list[list[str]]:
    """Return the cells below `HEADER`: the Pareto front, the best candidate and its controls, the cheapest first."""
    last = {row["candidate"]: row["rungs"][-1] for row in result["candidates"] if row["rungs"]}
    best = result["winner"] or result["closest"]
    names = dict.fromkeys(
        [*result["front"], *([best] if best else []), *(row["control"] for row in result["controls"])]
    )
    return [_cells(name, last[name]) for name in sorted(names, key=lambda name: _cost(last[name], result))]


def _cost(standing: Mapping[str, Any], result: Mapping[str, Any]) -> float:
    return float(standing["time"]["value"] if result["wish"]["by"] == "time" else standing["flops"])


def _cells(name: str, standing: Mapping[str, Any]) -> list[str]:
    right = standing["agreement"] if standing["accuracy"] is None else standing["accuracy"]
    flops = "unknown" if standing["flops"] is None else f"{standing['flops']:.0%}"
    loss, kl = standing["loss"], "inf" if standing["kl"] is None else f"{standing['kl']:.4f}"
    return [
        name, str(standing["prompts"]), f"{loss['value']:.1%}", f"{loss['at_most']:.1%}", f"{right:.1%}",
        kl, f"{standing['tokens']:.0%}", flops, f"{standing['time']['value']:.0%}",
    ]  # fmt: skip


def header(result: Mapping[str, Any]) -> list[str]:
    """Return the heads of the columns of `table`."""
    return ["agreement" if head == "accuracy" and not result["labelled"] else head for head in HEADER]


def verdict(result: Mapping[str, Any]) -> list[str]:
    """Say in sentences what came out: the winner, and what the controls do at as many tokens."""
    wish, best = result["wish"], result["winner"] or result["closest"]
    if best is None:
        return ["No candidate ran on these prompts."]
    last = next(row["rungs"][-1] for row in result["candidates"] if row["candidate"] == best)
    flops = "" if last["flops"] is None else f", {last['flops']:.0%} of the FLOPs"
    facts = (
        f"loss {last['loss']['value']:.1%} (at most {last['loss']['at_most']:.1%}), {last['time']['value']:.0%} of the "
        f"time{flops}, {last['tokens']:.0%} of the tokens, on {last['prompts']} prompts"
    )
    sure = f"{wish['confidence']:.0%} confidence"
    if result["winner"]:
        lines = [f"{best} fulfils the wish, {wish['text']}, with {sure}: {facts}."]
        if best.split()[0] in CONTROLS:
            lines.append("It is a control: no method that chooses tokens does better on these prompts.")
    else:
        lines = [f"No candidate fulfils the wish, {wish['text']}, with {sure}. The closest is {best}: {facts}."]
    for row in result["controls"]:
        ahead = row["ahead"]
        proof = "no proof of a difference"
        if ahead["at_least"] > 0:
            proof = f"{best} is ahead by at least {ahead['at_least']:.1%}"
        elif ahead["at_most"] < 0:
            proof = f"{best} is behind by at least {-ahead['at_most']:.1%}"
        lines.append(f"The control {row['control']} loses {row['loss']['value']:.1%}: {proof}.")
    return lines


def markdown(result: Mapping[str, Any]) -> str:
    """Return the verdict and the table of the Pareto front as Markdown."""
    about = (
        f"{result['prompts']} prompts about {result['images']} images, {len(result['candidates'])} candidates, rungs "
        f"of {', '.join(map(str, result['rungs']))} prompts; the unpruned model takes "
        f"{show_time(result['unpruned']['seconds'])} per prompt in the median ({result['config']['clock']} clock, "
        f"{result['machine']['processor']}, {result['machine']['threads']} thread(s))"
    )
    if result["labelled"]:
        about += f" and is right on {result['unpruned']['accuracy']:.1%}"
    heads = header(result)
    lines = [f"| {' | '.join(heads)} |", "|---|" + "--:|" * (len(heads) - 1)]
    lines += [f"| {' | '.join(cells)} |" for cells in table(result)]
    return "\n".join([*verdict(result), "", f"{about}.", "", *lines])
