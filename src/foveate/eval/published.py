"""Numbers that papers and repositories state, to hold one's own runs against.

Each file of the folder ``published`` is one source with its tables. A table has a model, its number of visual tokens
where known, how it is known, its benchmarks, and rows with a method, a budget (tokens that reach the LLM, the mean over
its layers for methods inside it) or a ``setting`` in words, and a value per benchmark.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from foveate.core.errors import InputError, UnknownNameError

FOLDER: Final = Path(__file__).with_name("published")
KNOWN: Final = ("paper", "repository", "secondary", "unverified")
"""Read in the paper, in its authors' repository, in another paper or document, or not checked."""
UNPRUNED: Final = "unpruned"
RELATIVE: Final = "relative"
_UNITS: Final = {
    RELATIVE: "% of unpruned", "MME": "points", "MME-total": "points", "MME-cognition": "points", "NoCaps": "CIDEr",
    "Flickr30k": "CIDEr", "TGIF score": "of 5", "MSVD score": "of 5", "MSRVTT score": "of 5",
}  # fmt: skip
_NAMES: Final = {
    "LLaVA-NeXT-7B": "llava-v1.6-vicuna-7b", "LLaVA-NeXT-13B": "llava-v1.6-vicuna-13b",
}  # fmt: skip
"""What the hub calls models whose usual name is another."""
_TASKS: Final = {
    ("gqa", "exact_match"): ("GQA", 100), ("pope", "pope_f1_score"): ("POPE", 100),
    ("mme", "mme_perception_score"): ("MME", 1), ("mme", "mme_cognition_score"): ("MME-cognition", 1),
    ("textvqa_val", "exact_match"): ("TextVQA", 100), ("vqav2_val", "exact_match"): ("VQAv2", 100),
    ("vizwiz_vqa_val", "exact_match"): ("VizWiz", 100), ("scienceqa_img", "exact_match"): ("SQA", 100),
    ("mmbench_en_dev", "gpt_eval_score"): ("MMBench", 1), ("mmbench_cn_dev", "gpt_eval_score"): ("MMBench-CN", 1),
    ("mmvet", "gpt_eval_score"): ("MM-Vet", 1), ("seedbench", "seed_all"): ("SEED", 100),
    ("seedbench", "seed_image"): ("SEED-image", 100),
}  # fmt: skip
"""Benchmark of each task and metric of lmms-eval, and the factor that brings it to the scale of the papers."""
NEAR: Final = 1.25
"""Budgets of two models are compared if their shares of the visual tokens differ by no more than this factor."""
ROUNDING: Final = 0.5
"""Budgets of one model are the same if they differ by no more tokens; the counts behind each layer are rounded."""


@dataclass(frozen=True)
class Number:
    """One published value.

    Attributes
    ----------
    method
        A name of a method, of foveate where it has it, or ``"unpruned"``.
    model, visual_tokens
        The model, and how many visual tokens it has for an image, if that is one number.
    budget, setting
        Tokens that are kept, or in words what was set.
    benchmark, value, unit
        What was measured.
    source, title
        The arXiv id, or what else the number is from.
    known
        One of `KNOWN`.
    """

    method: str
    model: str
    visual_tokens: int | None
    budget: float | None
    setting: str | None
    benchmark: str
    value: float
    unit: str
    source: str
    title: str
    known: str

    @property
    def verified(self) -> bool:
        """Whether it was read where its authors published it."""
        return self.known in ("paper", "repository")

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and `verified` as JSON-compatible data."""
        return {**asdict(self), "verified": self.verified}


@functools.cache
def numbers() -> tuple[Number, ...]:
    """Return all published numbers."""
    return tuple(number for file in sorted(FOLDER.glob("*.json")) for number in read(file))


def read(file: Path) -> Iterator[Number]:
    """Yield the numbers of one file.

    Raises
    ------
    InputError
        If the file does not follow the schema.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        _check(data, {"source": str, "title": str, "tables": list})
        for table in data["tables"]:
            yield from _numbers(table, data["source"], data["title"])
    except (OSError, ValueError) as error:
        raise InputError(f"{file.name} holds no published numbers: {error}") from error


def _numbers(table: Mapping[str, Any], source: str, title: str) -> Iterator[Number]:
    kinds = {"model": str, "visual_tokens": int | None, "known": str, "benchmarks": list, "rows": list}
    _check(table, kinds)
    if table["known"] not in KNOWN:
        raise ValueError(f"known is {', '.join(KNOWN)}, not {table['known']!r}")
    for row in table["rows"]:
        _check(row, {"method": str, "budget": float | int | None, "values": list}, {"setting": str})
        if len(row["values"]) != len(table["benchmarks"]):
            raise ValueError(f"{len(row['values'])} values for {len(table['benchmarks'])} benchmarks: {row}")
        for benchmark, value in zip(table["benchmarks"], row["values"], strict=True):
            if value is not None:
                yield Number(
                    row["method"], table["model"], table["visual_tokens"], row["budget"], row.get("setting"), benchmark,
                    float(value), _UNITS.get(benchmark, "%"), source, title, table["known"],
                )  # fmt: skip


def _check(data: Mapping[str, Any], required: Mapping[str, Any], optional: Mapping[str, Any] | None = None) -> None:
    kinds = {**required, **(optional or {})}
    if not set(required) <= set(data) <= set(kinds):
        raise ValueError(f"an entry has {', '.join(required)}, not {', '.join(data)}")
    if wrong := [name for name, value in data.items() if not isinstance(value, kinds[name])]:
        raise ValueError(f"{wrong[0]} cannot be {data[wrong[0]]!r}")


def of_method(method: str) -> list[Number]:
    """Return the published numbers of a method.

    Raises
    ------
    UnknownNameError
        If there are none; the message lists the methods that have some.
    """
    found = [number for number in numbers() if number.method == method]
    if not found:
        methods = sorted({number.method for number in numbers()})
        raise UnknownNameError(f"no numbers of {method!r} are on file; there are: {', '.join(methods)}")
    return found


def beside(path: Path) -> list[dict[str, Any]]:
    """Return the values of a run with the published ones next to them.

    Values of lmms-eval are held against those of the same model, method, budget and benchmark; the relative averages of
    a leaderboard against those of any model at a similar share of its visual tokens.

    Raises
    ------
    InputError
        If the file holds neither, or nothing published compares with it.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        pairs = list(_beside_benchmarks(data) if "results" in data else _beside_leaderboard(data))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"{str(path)!r} holds neither a leaderboard nor results of `foveate eval --harness lmms-eval`: {error!r}"
        ) from error
    if not pairs:
        raise InputError(f"nothing published compares with {str(path)!r}: see `foveate eval --published all`")
    return pairs


def _beside_benchmarks(data: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    about = data["foveate"]
    method = about["method"]["method"] if about["method"] else UNPRUNED
    for (task, metric), (benchmark, factor) in _TASKS.items():
        scores = {name.partition(",")[0]: value for name, value in data["results"].get(task, {}).items()}
        if metric not in scores:
            continue
        counts = about["tasks"][task]
        tokens = counts.get("equivalent_tokens", counts["kept_tokens"])  # published budgets are means over layers
        for number in numbers():
            fits = number.benchmark == benchmark and number.method == method and _same(number.model, about["model"])
            if fits and (method == UNPRUNED or _near(number.budget, tokens)):
                yield _pair(number, about["model"], tokens, factor * scores[metric])


def _near(budget: float | None, tokens: float) -> bool:
    return budget is not None and abs(budget - tokens) <= ROUNDING


def _same(model: str, ours: str) -> bool:
    return ours.lower().rpartition("/")[2].startswith(_NAMES.get(model, model).lower())


def _beside_leaderboard(data: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    config = data["config"]
    for row in data["rows"]:
        share = row["tokens"] / config["visual_tokens"]
        for number in numbers():
            if number.method != row["method"] or number.benchmark != RELATIVE:
                continue
            if number.budget and number.visual_tokens:
                factor = share * number.visual_tokens / number.budget
                if 1 / NEAR <= factor <= NEAR:
                    yield _pair(number, config["model"], row["tokens"], row["relative"]["average"])


def _pair(number: Number, model: str, tokens: float, ours: float) -> dict[str, Any]:
    return {
        "method": number.method, "benchmark": number.benchmark, "unit": number.unit, "model": model, "budget": tokens,
        "ours": round(ours, 2), "published": number.value, "published_model": number.model,
        "published_budget": number.budget, "source": number.source, "known": number.known, "verified": number.verified,
    }  # fmt: skip
