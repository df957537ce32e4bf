"""The command that finds parameters on prompts of the user's own: those of VFlowOpt, and where Gaze stops."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from foveate.cli.tools import ERRORS, Json, guarded, load, print_json, refuse, write_json
from foveate.core.errors import InputError

if TYPE_CHECKING:
    from foveate.core.reducer import Method


OPTIONS = {
    "vflowopt": ("keep", "calls", "initial"),
    "gaze": ("tokens",),
    "gaze_query": ("tokens",),
}
"""What only some of the methods take."""


class Calibrated(str, Enum):
    vflowopt, gaze, gaze_query = "vflowopt", "gaze", "gaze_query"


@guarded
def calibrate(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="File to write, *.json: a method for --method and load_reducer.")],
    method: Annotated[
        Calibrated, typer.Option(help="What is calibrated: all parameters of vflowopt, or where gaze stops.")
    ] = Calibrated.vflowopt,
    keep: Annotated[float, typer.Option(help="vflowopt: mean share of visual tokens that the layers receive.")] = 0.25,
    tokens: Annotated[int, typer.Option(min=1, help="gaze: mean number of tokens to keep of a picture or crop.")] = 8,
    model: Annotated[str, typer.Option(help="nano, a hub id, or a folder.")] = "nano",
    prompts: Annotated[
        Path | None, typer.Option(help='JSON file: [{"image": "a.png", "question": "what is it?"}, ...].')
    ] = None,
    scenes: Annotated[int | None, typer.Option(min=1, help="Draw this many scenes with questions instead.")] = None,
    calls: Annotated[int, typer.Option(min=1, help="vflowopt: parameters tried, each on all prompts.")] = 300,
    initial: Annotated[int, typer.Option(min=1, help="vflowopt: how many of them at random.")] = 27,
    seed: Annotated[int, typer.Option(help="Of the search, and of drawn scenes.")] = 42,
    prompt_template: Annotated[str | None, typer.Option(help="Text with <image> and {question}.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="As in transformers: auto, cpu, cuda:1.")] = None,
    attn: Annotated[str | None, typer.Option(help="Attention implementation: sdpa, eager, flash_attention_2.")] = None,
    as_json: Json = False,
) -> None:
    """Find parameters on prompts of your own: those with which VFlowOpt changes a model's answers least, or gaze's tau.

    VFlowOpt's paper takes 30 prompts, and the search needs foveate[calibrate]. For gaze take about 100.
    """
    for name in dict.fromkeys(name for options in OPTIONS.values() for name in options):
        if name not in OPTIONS[method.value]:
            refuse(context, (name,), f"this is no option of --method {method.value}")
    if (prompts is None) == (scenes is None):
        raise InputError("say where the prompts come from: either --prompts FILE or --scenes N")
    if out.suffix != ".json":
        raise InputError(f"the result is a JSON file: name it {out.with_suffix('.json').name!r}")
    with contextlib.redirect_stdout(sys.stderr):
        from foveate.measure.loading import model_inputs, prompt_for
        from foveate.measure.provenance import versions

        pairs = list(_scenes(scenes, seed) if scenes else _listed(Path(str(prompts))))
        loaded, processor = load(model, dtype, device_map, attn)
        inputs = [
            dict(
                model_inputs(processor, image, prompt_for(processor, question, prompt_template))
                .to(loaded.device, loaded.dtype)
            )
            for image, question in pairs
        ]  # fmt: skip
        if method is Calibrated.vflowopt:
            reducer, figures, told = _vflowopt(loaded, inputs, keep, calls, initial, seed)
        else:
            reducer, figures, told = _gaze(loaded, inputs, tokens, method.value)
        write_json(out, reducer.to_dict())
    data = {
        "method": str(out), "reducer": reducer.to_dict(), "prompts": len(inputs), "seed": seed, "model": model,
        **figures, "versions": versions(),
    }  # fmt: skip
    if as_json:
        print_json(data)
    else:
        print(f"{reducer!r} in {out}\n{told}")


def _vflowopt(
    model: Any, inputs: list[dict[str, Any]], keep: float, calls: int, initial: int, seed: int
) -> tuple[Method, dict[str, Any], str]:
    from foveate.fit.vflowopt import calibrate as search

    with _progress() as progress:
        task, best = progress.add_task("searching", total=calls), [-1.0]

        def done(score: float) -> None:
            best[0] = max(best[0], score)
            progress.update(task, advance=1, description=f"best cosine {best[0]:.4f}")

        found = search(model, inputs, keep, calls, initial, seed, done)
    figures = {
        "share": found.share, "cosine": found.score, "cosine_default": found.default, "calls": calls,
        "initial": initial, "cosines": found.scores,
    }  # fmt: skip
    told = (
        f"mean share of tokens {found.share:.4f}, cosine to the unpruned model {found.score:.4f} (without a search "
        f"{found.default:.4f})"
    )
    return found.reducer, figures, told


def _gaze(model: Any, inputs: list[dict[str, Any]], tokens: int, method: str) -> tuple[Method, dict[str, Any], str]:
    from foveate.fit.gaze import calibrate as search
    from foveate.methods import Gaze, GazeQuery

    with _progress() as progress:
        task = progress.add_task("looking", total=len(inputs))
        found = search(
            model,
            inputs,
            tokens,
            GazeQuery if method == "gaze_query" else Gaze,
            lambda: progress.update(task, advance=1),
        )
    figures = {"tokens": tokens, "mean": found.mean, "counts": found.counts}
    return (
        found.reducer,
        figures,
        f"keeps {min(found.counts)} to {max(found.counts)} tokens, {found.mean:.2f} on average",
    )


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=ERRORS)


def _scenes(count: int, seed: int) -> Iterator[tuple[Any, str]]:
    from foveate.nano.scenes import scenes

    return ((scene.image, scene.questions[0].text) for scene in scenes(seed, count, "train") if scene.questions)


def _listed(file: Path) -> Iterator[tuple[Any, str]]:
    from foveate.measure.loading import open_image

    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the prompts in {str(file)!r}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{str(file)!r} is no JSON: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise InputError(f'{str(file)!r} must hold a list of prompts: [{{"image": "a.png", "question": "what?"}}, ...]')
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("image", "question")):
            raise InputError(f'prompt {number} of {str(file)!r} needs an "image" and a "question", not {row!r}')
        yield open_image(file.parent / row["image"]), row["question"]
