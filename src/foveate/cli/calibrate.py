"""The command that searches for VFlowOpt's parameters on prompts of the user's own."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from foveate.cli.tools import ERRORS, Json, guarded, load, print_json, write_json
from foveate.core.errors import InputError


@guarded
def calibrate(
    out: Annotated[Path, typer.Option(help="File to write, *.json: a method for --method and load_reducer.")],
    keep: Annotated[float, typer.Option(help="Mean share of visual tokens that the layers receive.")] = 0.25,
    model: Annotated[str, typer.Option(help="nano, a hub id, or a folder.")] = "nano",
    prompts: Annotated[
        Path | None, typer.Option(help='JSON file: [{"image": "a.png", "question": "what is it?"}, ...].')
    ] = None,
    scenes: Annotated[int | None, typer.Option(min=1, help="Draw this many scenes with questions instead.")] = None,
    calls: Annotated[int, typer.Option(min=1, help="Parameters tried, each on all prompts.")] = 300,
    initial: Annotated[int, typer.Option(min=1, help="How many of them at random.")] = 27,
    seed: Annotated[int, typer.Option(help="Of the search, and of drawn scenes.")] = 42,
    prompt_template: Annotated[str | None, typer.Option(help="Text with <image> and {question}.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="As in transformers: auto, cpu, cuda:1.")] = None,
    attn: Annotated[str | None, typer.Option(help="Attention implementation: sdpa, eager, flash_attention_2.")] = None,
    as_json: Json = False,
) -> None:
    """Search for the parameters with which VFlowOpt changes a model's answers least, at a budget.

    The paper takes 30 prompts. Needs foveate[calibrate].
    """
    if (prompts is None) == (scenes is None):
        raise InputError("say where the prompts come from: either --prompts FILE or --scenes N")
    if out.suffix != ".json":
        raise InputError(f"the result is a JSON file: name it {out.with_suffix('.json').name!r}")
    with contextlib.redirect_stdout(sys.stderr):
        from foveate.fit.vflowopt import calibrate as search
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
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=ERRORS) as progress:
            task, best = progress.add_task("searching", total=calls), [-1.0]

            def done(score: float) -> None:
                best[0] = max(best[0], score)
                progress.update(task, advance=1, description=f"best cosine {best[0]:.4f}")

            found = search(loaded, inputs, keep, calls, initial, seed, done)
        write_json(out, found.reducer.to_dict())
    data = {
        "method": str(out), "reducer": found.reducer.to_dict(), "share": found.share, "cosine": found.score,
        "cosine_default": found.default, "prompts": len(inputs), "calls": calls, "initial": initial, "seed": seed,
        "model": model, "cosines": found.scores, "versions": versions(),
    }  # fmt: skip
    if as_json:
        print_json(data)
    else:
        print(
            f"{found.reducer!r} in {out}\nmean share of tokens {found.share:.4f}, cosine to the unpruned model "
            f"{found.score:.4f} (without a search {found.default:.4f})"
        )


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
