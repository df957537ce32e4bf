"""Training nano from nothing: one process per core, resumable, nothing downloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from foveate.core.errors import FoveateError
from training.nano.export import export
from training.nano.recipe import Recipe
from training.nano.worker import Worker

ROOT = Path(__file__).resolve().parents[2]
# Waiting threads of one process would otherwise spin on the core that another process computes on.
PROCESS_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


def train(recipe: Recipe, out: str | Path, resume: bool = False, processes: int = 2) -> Path:
    """Train from nothing and write a stock model folder.

    Parameters
    ----------
    recipe : Recipe
        What to train; ``Recipe.load()`` is the recipe of the shipped weights.
    out : str or Path
        Folder for the drawn images, checkpoints (safetensors), ``log.jsonl`` and the model folder ``weights``.
    resume : bool
        Go on from the checkpoints in ``out``. The result is the same as without the interruption.
    processes : int
        Single-threaded processes that share each step; 1 trains in this process.

    Returns
    -------
    Path
        The model folder.

    Raises
    ------
    FoveateError
        If ``out`` holds another run and ``resume`` is false, if it holds another recipe, or if a process fails.
    """
    out = Path(out)
    _prepare(recipe, out, resume)
    if processes == 1:
        Worker(recipe, out).run()
    else:
        _run_processes(recipe, out, processes)
    folder = out / "weights"
    export(recipe, out / "final.safetensors", folder)
    return folder


def _prepare(recipe: Recipe, out: Path, resume: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    path = out / "recipe.json"
    if path.exists() and not resume:
        raise FoveateError(f"{out} holds a training run already; resume it or choose another folder")
    if path.exists() and Recipe.load(path) != recipe:
        raise FoveateError(f"{path} differs from the recipe given; resume with the recipe that the run began with")
    recipe.save(path)
    (out / "meeting").unlink(missing_ok=True)


def _run_processes(recipe: Recipe, out: Path, count: int) -> None:
    command = [sys.executable, "-m", "training.nano.worker", str(out)]
    found = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **PROCESS_ENVIRONMENT, "PYTHONPATH": found}
    running = [subprocess.Popen([*command, str(rank), str(count)], env=environment) for rank in range(count)]
    try:
        _watch(recipe, out, running)
    finally:
        for process in running:
            if process.poll() is None:
                process.terminate()
    codes = [process.wait() for process in running]
    if any(codes):
        raise FoveateError(f"training stopped: exit codes {codes}; see the messages above, then resume")


def _watch(recipe: Recipe, out: Path, running: list[subprocess.Popen[bytes]]) -> None:
    """Show progress from the log until every process has ended, or one has failed."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        tasks = {
            name: progress.add_task(name, total=stage.steps, note="")
            for name, stage in (("tower", recipe.tower), ("decoder", recipe.decoder))
        }
        read = 0
        while True:
            ended = all(process.poll() is not None for process in running)
            text = (out / "log.jsonl").read_text() if (out / "log.jsonl").exists() else ""
            lines = text[: text.rfind("\n") + 1].splitlines()  # the last line may be half written
            for line in lines[read:]:
                entry = json.loads(line)
                if entry["stage"] in tasks:
                    _show(progress, tasks[entry["stage"]], entry)
            read = len(lines)
            if ended or any(process.poll() for process in running):
                return
            time.sleep(1.0)


def _show(progress: Progress, task: object, entry: dict[str, float]) -> None:
    shown = {name: value for name, value in entry.items() if name not in ("stage", "step", "seconds")}
    note = " ".join(f"{name} {value:.3f}" for name, value in shown.items())
    progress.update(task, completed=entry["step"], note=note if "loss" in shown else "")  # type: ignore[arg-type]
    if "loss" not in shown:
        progress.console.print(f"{entry['stage']} step {entry['step']}: {note}")
