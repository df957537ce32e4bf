"""The leaderboard: every method at every budget on the embedded model, its figures, its table and its plot."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

import foveate.nano as nano
from foveate.core.errors import FoveateError, InputError
from foveate.eval.published import UNPRUNED
from foveate.eval.scenes import (
    BLIND,
    BUDGETS,
    DRAWS,
    SPLIT,
    Answers,
    Counts,
    Entry,
    as_they_are,
    blocks,
    budgets_of,
    check_runs,
    collect,
    entries,
    weights_digest,
)
from foveate.eval.statistics import FLIPS, RESAMPLES, holm, relative_average, sign_flip
from foveate.measure.baselines import BASELINES
from foveate.measure.job import Job, prepare
from foveate.measure.pages import markdown_table
from foveate.measure.provenance import versions
from foveate.measure.run import Outcome, run_methods
from foveate.nano.evaluate import Tally, clustered
from foveate.nano.questions import ASKED_KINDS, QUESTION_KINDS

Result = dict[str, Any]
Variant: TypeAlias = tuple[float, bool]
"""`rectify` and `absorb`."""
COSTED: Final = 1
"""Scenes whose first question is run to count costs; these hardly differ between scenes."""


def leaderboard(
    methods: Sequence[str],
    budgets: Sequence[int] | None,
    images: int,
    seed: int,
    rows: Path,
    processes: int = 1,
    progress: Callable[[int, int], None] = lambda done, of: None,
    variants: Sequence[Variant] = (),
) -> Result:
    """Run methods on test scenes, as far as that has not been done, and work out all figures.

    Parameters
    ----------
    methods
        Names of methods or files with one; all methods if empty. The baselines are always added.
    budgets
        Visual tokens to keep, of files instead of their own budgets. `None`: `BUDGETS`, and files as they are.
    images, seed, rows, processes, progress
        See `foveate.eval.scenes.collect`.
    variants
        What each method is also run with, at every budget, for columns of their own.

    Returns
    -------
    dict
        Plain values: configuration, versions, a row per method and budget, and why methods are left out. The versions
        are those that worked out figures and costs; rows name the commits of their answers.
    """
    blocks(images)  # refuses what cannot be run, before anything is loaded
    model, processor = nano.load()
    config = model.config
    total = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    shown = [nano.scene(SPLIT, seed, index) for index in range(COSTED)]
    jobs = [prepare(model, processor, s.image, s.questions[0].text, max_new_tokens=1) for s in shown]
    own = as_they_are(jobs[0], methods) if budgets is None else {}
    found, left_out = entries(model, methods, BUDGETS if budgets is None else budgets, total, own)
    more, not_so = varied(model, found, variants)
    left_out, plain = left_out + not_so, found
    found = [*plain, *more]
    answers = collect(found, images, seed, rows, processes, progress)
    costs = _costs(jobs, plain)
    return {
        "config": {
            "model": "nano", "weights": weights_digest(), "split": SPLIT, "seed": seed, "images": images,
            "questions": int(answers[UNPRUNED].asked.sum()), "draws": DRAWS, "budgets": budgets_of(plain),
            "visual_tokens": total, "dtype": "float32", "device": "cpu", "attention": config._attn_implementation,
            "variants": list(dict.fromkeys(entry.variant for entry in more)),
            "bootstrap_samples": RESAMPLES, "sign_flips": FLIPS,
        },
        "versions": versions(),
        "unpruned": _plain(answers[UNPRUNED]) | {"cost": costs[UNPRUNED, None]},
        "blind": _plain(answers[BLIND]),
        "rows": table_rows(found, answers, costs),
        "left_out": left_out,
    }  # fmt: skip


def varied(model: Any, found: Sequence[Entry], variants: Sequence[Variant]) -> tuple[list[Entry], list[dict[str, Any]]]:
    """Return the entries with a method once more in each variant; and which cannot run so, as in `entries`."""
    more, reasons = [], defaultdict(list)
    for rectify, absorb in variants:
        for entry in (e for e in found if e.reducers):
            own = replace(entry, rectify=rectify, absorb=absorb)
            try:
                check_runs(model, entry.reducers[0], rectify, absorb)
                more.append(own)
            except FoveateError as error:
                reasons[entry.method, own.variant, str(error)].append(entry.budget)
    left_out = [
        {"method": method, "variant": variant, "budgets": budgets, "reason": reason}
        for (method, variant, reason), budgets in reasons.items()
    ]
    return more, left_out


def _plain(answers: Answers) -> dict[str, Any]:
    return {**Tally(answers.right, answers.asked).summary(), "commits": list(answers.commits)}


def table_rows(
    found: Sequence[Entry], answers: Mapping[str, Answers], costs: Mapping[Any, Any]
) -> list[dict[str, Any]]:
    """Work out the figures of each entry that has a method, best first within a budget; variants in their rows."""
    unpruned = answers[UNPRUNED]
    rows, right = [], {}
    for entry in found:
        if not entry.reducers or entry.variant:
            continue
        conditions = entry.conditions()
        draws, total, mean = _draws(entry, answers)
        right[entry.method, entry.budget] = mean.sum(axis=1)
        summary = Tally(total, len(draws) * unpruned.asked).summary()
        kinds = {kind: _relative(mean, unpruned.right, kind) for kind in ASKED_KINDS}
        worst = min(kinds, key=lambda kind: kinds[kind])
        first = entry.reducers[0]
        rows.append({
            "method": entry.method, "budget": entry.budget, "stage": first.stages()[-1].stage,
            "query_aware": any(part.query_aware for part in first.stages()),
            "merges": first.merges, "positions": conditions[0].positions, "reducers": [repr(r) for r in entry.reducers],
            "tokens": round(float(np.mean([d.kept for d in draws])), 2),
            "accuracy": summary.pop("all"),
            "kinds": {kind: {**summary[kind], "relative": kinds[kind]} for kind in summary},
            "relative": relative_average(mean, unpruned.right),
            "worst": {"kind": worst, "relative": kinds[worst]},
            "loyalty": _loyalty(draws, unpruned),
            "cost": costs.get((entry.method, entry.budget)),
            "commits": sorted({commit for d in draws for commit in d.commits}),
        })  # fmt: skip
    _add_variants(rows, right, found, answers)
    order = budgets_of(found)
    for budget in order:
        _compare([row for row in rows if row["budget"] == budget], right, unpruned)
    return sorted(rows, key=lambda row: (order.index(row["budget"]), -row["relative"]["average"]))


def _draws(entry: Entry, answers: Mapping[str, Answers]) -> tuple[list[Answers], NDArray[Any], NDArray[Any]]:
    """Return the answers of an entry's draws, and its right ones per image and kind: their sum and their mean."""
    draws = [answers[condition.name] for condition in entry.conditions()]
    total = np.sum([d.right for d in draws], axis=0)
    return draws, total, total / len(draws)


def _add_variants(
    rows: Sequence[dict[str, Any]], right: Mapping[Any, NDArray[Any]], found: Sequence[Entry],
    answers: Mapping[str, Answers],
) -> None:  # fmt: skip
    """Add to each row what the variants of its method come to, and their paired gain over the plain one."""
    unpruned = answers[UNPRUNED]
    of = {(row["method"], row["budget"]): row for row in rows}
    pairs: dict[Any, list[tuple[dict[str, Any], NDArray[Any]]]] = defaultdict(list)
    for entry in found:
        if not entry.variant:
            continue
        draws, total, mean = _draws(entry, answers)
        summary = Tally(total, len(draws) * unpruned.asked).summary()
        shown = of[entry.method, entry.budget].setdefault("variants", {})[entry.variant] = {
            "accuracy": summary.pop("all"),
            "kinds": {kind: {**summary[kind], "relative": _relative(mean, unpruned.right, kind)} for kind in summary},
            "relative": relative_average(mean, unpruned.right),
            "loyalty": _loyalty(draws, unpruned),
            "commits": sorted({commit for d in draws for commit in d.commits}),
        }
        pairs[entry.variant, entry.budget].append((shown, mean.sum(axis=1) - right[entry.method, entry.budget]))
    asked = unpruned.asked.sum(axis=1)
    for gaps in pairs.values():
        for (shown, gap), p in zip(gaps, holm([sign_flip(gap) for _, gap in gaps]), strict=True):
            gain = clustered(gap, asked)
            shown["gain"] = {"points": gain["accuracy"], "error": gain["error"], "p": round(p, 5)}


def _relative(right: NDArray[Any], unpruned: Counts, kind: str) -> float:
    column = QUESTION_KINDS.index(kind)
    return round(100 * float(right[:, column].sum() / unpruned[:, column].sum()), 2)


def _loyalty(draws: Sequence[Answers], unpruned: Answers) -> dict[str, float]:
    asked = unpruned.asked.sum(axis=1)
    found = clustered(np.mean([d.agreed for d in draws], axis=0), asked)
    return {"agreement": found["accuracy"], "error": found["error"]}


def _compare(rows: list[dict[str, Any]], right: Mapping[Any, NDArray[Any]], unpruned: Answers) -> None:
    """Add each row's paired differences to the baselines and to the best row of the same budget."""
    best = max(rows, key=lambda row: row["relative"]["average"])["method"]
    asked = unpruned.asked.sum(axis=1)
    for row in rows:
        row["against"] = {}
    for label, other in {**{name: name for name in BASELINES}, "best": best}.items():
        pairs = [(row, right[row["method"], row["budget"]] - right[other, row["budget"]]) for row in rows]
        pairs = [(row, gap) for row, gap in pairs if row["method"] != other]
        for (row, gap), p in zip(pairs, holm([sign_flip(gap) for _, gap in pairs]), strict=True):
            found = clustered(gap, asked)
            row["against"][label] = {
                "method": other,
                "points": found["accuracy"],
                "error": found["error"],
                "p": round(p, 5),
            }


def _costs(jobs: Sequence[Job], found: Sequence[Entry]) -> dict[tuple[str, int | None], dict[str, Any]]:
    """Count the FLOPs and the KV cache of a prompt under each entry, means over a few scenes."""
    listed = [entry for entry in found if entry.method != BLIND]
    reducers = [entry.reducers[0] if entry.reducers else None for entry in listed]
    measured = [run_methods(job, reducers, repeats=0) for job in jobs]
    whole = [outcomes[0] for outcomes in measured]
    return {
        (entry.method, entry.budget): _cost([outcomes[i] for outcomes in measured], whole)
        for i, entry in enumerate(listed)
    }


def _cost(outcomes: Sequence[Outcome], whole: Sequence[Outcome]) -> dict[str, Any]:
    def flops(of: Sequence[Outcome]) -> dict[str, float]:
        parts = [outcome.cost.to_dict() for outcome in of if outcome.cost is not None]
        return {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}

    own, base = flops(outcomes), flops(whole)
    kv, kv_base = (sum(outcome.kv_bytes for outcome in of) / len(of) for of in (outcomes, whole))
    return {
        "flops": {name: round(value) for name, value in own.items()},
        "of_unpruned": round(own["total"] / base["total"], 4),
        "llm_of_unpruned": round(own["prefill"] / base["prefill"], 4), "kv_bytes": round(kv),
        "kv_of_unpruned": round(kv / kv_base, 4),
    }  # fmt: skip


def load(path: Path) -> Result:
    """Read a leaderboard from its file.

    Raises
    ------
    InputError
        If the file holds none.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if not {"config", "rows", "unpruned"} <= set(result):
            raise ValueError("it lacks config, rows or unpruned")
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{str(path)!r} holds no leaderboard: {error}") from error
    return dict(result)


def tables(result: Result) -> dict[str, str]:
    """Return the Markdown of the page's tables, by the name of their place."""
    return {"leaderboard-about": _about(result)} | {
        f"leaderboard-{budget}": _table(result, budget) for budget in result["config"]["budgets"]
    }


def _about(result: Result) -> str:
    config, full, blind = result["config"], result["unpruned"]["all"], result["blind"]["all"]
    errors = [row["relative"]["error"] for row in result["rows"]]
    return (
        f"{config['questions']:,} questions about {config['images']} test images (seed {config['seed']}). All "
        f"{config['visual_tokens']} tokens: {full['accuracy']:.1f} ± {full['error']:.1f} % right; with the image of "
        f"another scene, which tells what can be guessed: {blind['accuracy']:.1f} ± {blind['error']:.1f} %. Standard "
        f"errors of the relative average are between {min(errors):.1f} and {max(errors):.1f}. Methods that draw show "
        f"the mean of {config['draws']} draws."
    )


def _table(result: Result, budget: int) -> str:
    rows = [row for row in result["rows"] if row["budget"] == budget]
    head = [
        "method", "tokens", "relative average", "worst kind", *ASKED_KINDS, "loyalty", "FLOPs", "KV", "above random",
        "p", "to the best", "p", *variants_of(result),
    ]  # fmt: skip
    return markdown_table(head, [_line(row, variants_of(result)) for row in rows])


def variants_of(result: Result) -> list[str]:
    """Return the variants that methods were also run with."""
    return list(result["config"].get("variants", ()))  # results of earlier versions have none


def variant_cell(row: Mapping[str, Any], variant: str) -> str:
    """Return what a variant of a row's method comes to, and its gain in points; empty where it cannot run so."""
    found = row.get("variants", {}).get(variant)
    if found is None:
        return ""
    return f"{found['relative']['average']:.1f} ({found['gain']['points']:+.1f} ± {found['gain']['error']:.1f})"


def _line(row: Mapping[str, Any], variants: Sequence[str]) -> list[str]:
    relative, against = row["relative"], row["against"]
    kinds = [f"{row['kinds'][kind]['relative']:.0f}" for kind in ASKED_KINDS]
    return [
        f"`{row['method']}`", f"{row['tokens']:g}", f"{relative['average']:.1f} ± {relative['error']:.1f}",
        f"{row['worst']['kind']} {row['worst']['relative']:.0f}", *kinds, f"{row['loyalty']['agreement']:.1f}",
        cost_share(row, "of_unpruned"), cost_share(row, "kv_of_unpruned"),
        *_gap(against.get("random")), *_gap(against.get("best")), *(variant_cell(row, v) for v in variants),
    ]  # fmt: skip


def cost_share(row: Mapping[str, Any], name: str) -> str:
    """Return a cost in percent of the unpruned model's, for a table."""
    return "unknown" if row["cost"] is None else f"{100 * row['cost'][name]:.0f} %"


def _gap(gap: Mapping[str, Any] | None) -> list[str]:
    if gap is None:
        return ["", ""]
    return [f"{gap['points']:+.1f} ± {gap['error']:.1f}", "< 0.001" if gap["p"] < 0.001 else f"{gap['p']:.3f}"]
