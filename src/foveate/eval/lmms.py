"""Public benchmarks through lmms-eval: what runs there, and what a result says about the reduction.

The model class for lmms-eval is in `foveate.eval.lmms_model`; this module can be imported without lmms-eval.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from foveate.core.errors import FoveateError, InputError, UnknownNameError
from foveate.core.reducer import Method
from foveate.eval.lmms_arguments import check_unreduced, make_reducer
from foveate.measure.files import write_text

if TYPE_CHECKING:
    from foveate.core.reducer import Positions
    from foveate.engines.settings import Separators

MODEL_CLASSES = ("foveate.eval.lmms_model.ChatFoveate", "foveate.eval.lmms_model.SimpleFoveate")


def manifest() -> Any:
    """Describe the model ``foveate`` to lmms-eval, which finds this function through its entry-point group."""
    from lmms_eval.models.registry_v2 import ModelManifest

    chat, simple = MODEL_CLASSES
    return ModelManifest(model_id="foveate", chat_class_path=chat, simple_class_path=simple)


def run(
    model: str,
    tasks: Sequence[str],
    method: str | Path | Method | None = None,
    keep: Any = None,
    *,
    config: Mapping[str, Any] | None = None,
    batch_size: int = 1,
    limit: int | None = None,
    out: Path | None = None,
    samples: Path | None = None,
    include_path: str | Path | None = None,
    simple: bool = False,
    dtype: str = "auto",
    attn: str | None = None,
    device_map: str | None = None,
    positions: Positions | None = None,
    separators: Separators = "drop",
    frames: int = 32,
    rectify: float = 0.0,
    absorb: bool = False,
) -> dict[str, Any] | None:
    """Run benchmarks of lmms-eval on a model with a method attached.

    Under ``accelerate launch`` every process answers its share of the questions.

    Parameters
    ----------
    model
        ``"nano"``, a folder, or a hub id.
    tasks
        Names that lmms-eval knows, such as ``"gqa"``, or that `include_path` adds.
    method, keep, config
        The method, its budget and its further parameters; without a method the model is not reduced.
    batch_size
        Questions that go through the model together.
    limit
        Take so many questions of each task, from the first.
    out
        File for the result, in JSON.
    samples
        File for every question with its answer and its kept tokens, one JSON object a line.
    include_path
        Folder with further tasks.
    simple
        Ask in lmms-eval's older form of requests, which tasks that score given answers need.
    dtype, attn, device_map
        See `foveate.measure.loading.load_model`.
    positions, separators, rectify, absorb
        See `foveate.engines.settings.Settings`.
    frames
        Frames taken from each video.

    Returns
    -------
    dict or None
        What lmms-eval reports, its ``"results"`` by task and metric included, and under ``"foveate"`` what was
        reduced: see `summary`. `None` in all processes but the first.

    Raises
    ------
    FoveateError
        If lmms-eval is not installed, or cannot run the tasks.
    UnknownNameError
        If a task is unknown.
    """
    if batch_size < 1 or frames < 1 or (limit is not None and limit < 1):
        raise InputError(f"batch size, frames and limit are at least 1, not {batch_size}, {frames}, {limit}")
    reducer = make_reducer(method, keep, **(config or {}))
    check_unreduced(reducer, rectify=rectify, absorb=absorb)
    if importlib.util.find_spec("lmms_eval") is None:
        raise FoveateError("public benchmarks need lmms-eval: pip install 'foveate[eval]'")
    with contextlib.redirect_stdout(sys.stderr):
        manager = _task_manager(tasks, include_path)
        from foveate.eval import lmms_model

        kind = lmms_model.SimpleFoveate if simple else lmms_model.ChatFoveate
        adapter = kind(
            pretrained=model, method=reducer, batch_size=batch_size, dtype=dtype, attn=attn, device_map=device_map,
            positions=positions, separators=separators, frames=frames, rectify=rectify, absorb=absorb,
        )  # fmt: skip
        about, started = adapter.about(), time.perf_counter()
        results = _evaluate(adapter, tasks, manager, limit)
        seconds = time.perf_counter() - started
    if results is None:
        return None
    listed = results.pop("samples")
    document = {**results, "foveate": {**about, **summary(listed), "seconds": round(seconds, 3)}}
    if out is not None:
        write_text(out, json.dumps(document, indent=2) + "\n")
    if samples is not None:
        lines = [json.dumps({"task": name, **row}) + "\n" for name, rows in listed.items() for row in rows]
        write_text(samples, "".join(lines))
    return document


def _task_manager(tasks: Sequence[str], include_path: str | Path | None) -> Any:
    from lmms_eval.tasks import TaskManager
    from loguru import logger

    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"no folder with tasks at {str(include_path)!r}")
    if not tasks:
        raise InputError("no task is named: pass names such as gqa or pope")
    logger.disable("lmms_eval.tasks")  # it names every file that is no task, whatever verbosity it is given
    try:
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    finally:
        logger.enable("lmms_eval.tasks")
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        raise UnknownNameError(
            f"lmms-eval knows no task called {', '.join(unknown)}: `lmms-eval tasks list` lists them, and an include "
            "path adds your own"
        )
    return manager


def _evaluate(adapter: Any, tasks: Sequence[str], manager: Any, limit: int | None) -> dict[str, Any] | None:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.utils import handle_non_serializable
    from tenacity import RetryError

    try:
        results = simple_evaluate(
            model=adapter, model_args=adapter.words(), tasks=list(tasks), batch_size=adapter.batch_size, limit=limit,
            task_manager=manager, log_samples=True,
        )  # fmt: skip
    except FoveateError:
        raise
    except RetryError as error:
        cause = error.last_attempt.exception()
        raise FoveateError(f"lmms-eval failed on {', '.join(tasks)}: {type(cause).__name__}: {cause}") from error
    except AssertionError as error:
        hint = " (tasks that score given answers need foveate.eval.lmms.run(..., simple=True))"
        raise FoveateError(
            f"lmms-eval cannot run {', '.join(tasks)}: {error}{'' if adapter.is_simple else hint}"
        ) from error
    if results is None:
        return None
    plain: dict[str, Any] = json.loads(json.dumps(results, default=handle_non_serializable))
    return plain


def summary(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Tell how many visual tokens the samples of each task had and kept.

    Parameters
    ----------
    samples
        By task, as lmms-eval logs them; the first entry of each one's ``"token_counts"`` is a `lmms_model.Counts`.

    Returns
    -------
    dict
        ``"tasks"``: per task the number of samples, means of ``"visual_tokens"``, ``"kept_tokens"`` and
        ``"equivalent_tokens"`` (see `lmms_model.Counts`), ``"kept_per_sample"`` in the order of the task's documents,
        and the ``"model_seconds"`` of all samples together, which is the time of encoding, selecting and answering
        without that of reading and preparing the data.
    """
    tasks = {}
    for name, rows in samples.items():
        ordered = sorted(rows, key=lambda row: int(row["doc_id"]))
        counts = [row["token_counts"][0] for row in ordered]
        tasks[name] = {
            "samples": len(ordered),
            **{key: fmean(c[key] for c in counts) for key in ("visual_tokens", "kept_tokens", "equivalent_tokens")},
            "kept_per_sample": [count["kept_tokens"] for count in counts],
            "model_seconds": round(sum(c["seconds"] for row in ordered for c in row["token_counts"]), 3),
        }
    return {"tasks": tasks}
