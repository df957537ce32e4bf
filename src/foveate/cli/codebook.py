"""The command that builds a codebook of redundant visual tokens."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from foveate.cli.tools import Json, guarded, print_json
from foveate.core.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@guarded
def codebook(
    out: Annotated[Path, typer.Option(help="File to write, *.safetensors.")],
    model: Annotated[str, typer.Option(help="nano, a hub id, or a folder.")] = "nano",
    images: Annotated[Path | None, typer.Option(help="Folder of images; the paper takes 500.")] = None,
    scenes: Annotated[int | None, typer.Option(min=1, help="Draw this many scenes instead.")] = None,
    seed: Annotated[int, typer.Option(help="Different seeds give different scenes.")] = 0,
    question: Annotated[str, typer.Option(help="What to ask about every image.")] = "What is in the image?",
    prompt_template: Annotated[str | None, typer.Option(help="Text with <image> and {question}.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Tokens tested per image.")] = 96,
    repeat: Annotated[int, typer.Option(min=1, help="How often the prompt holds a token that is tested alone.")] = 1,
    confidence: Annotated[
        float, typer.Option(min=0, max=1, help="A token passes if the model, given it alone, is less sure of any word.")
    ] = 0.15,
    vocabulary: Annotated[int, typer.Option(min=2, help="Likeliest words that share this probability.")] = 50,
    divergence: Annotated[
        float, typer.Option(min=0, help="A token passes if the answer without it diverges by less.")
    ] = 2e-3,
    global_weight: Annotated[float, typer.Option(min=0, help="Weight of the image as a whole in that.")] = 16.0,
    image_clusters: Annotated[int, typer.Option(min=1, help="Clusters of the passing tokens of an image.")] = 8,
    largest: Annotated[int, typer.Option(min=1, help="Most tokens of such a cluster that stays.")] = 8,
    clusters: Annotated[int, typer.Option(min=1, help="Clusters of the passing tokens of all images.")] = 64,
    spread: Annotated[int, typer.Option(min=0, help="A cluster counts if it has tokens of more images.")] = 64,
    neighbours: Annotated[int, typer.Option(min=1, help="Nearest neighbours that tell the density.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Prompts per forward pass.")] = 32,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="As in transformers: auto, cpu, cuda:1.")] = None,
    attn: Annotated[str | None, typer.Option(help="Attention implementation: sdpa, eager, flash_attention_2.")] = None,
    as_json: Json = False,
) -> None:
    """Build the file that the method `codebook` needs: prototypes of tokens that tell a model nothing.

    The defaults are those of the paper for LLaVA-1.5-7B. Few images need a small --spread, other models other limits.
    """
    if (images is None) == (scenes is None):
        raise InputError("say where the images come from: either --images FOLDER or --scenes N")
    if out.suffix != ".safetensors":
        raise InputError(f"a codebook is a safetensors file: name it {out.with_suffix('.safetensors').name!r}")
    with contextlib.redirect_stdout(sys.stderr):
        from foveate.engines.transformers.reduce import pad_id
        from foveate.families import family_of
        from foveate.fit.codebook import Builder, Recipe
        from foveate.measure.loading import load_model, model_inputs, open_image, prompt_for

        recipe = Recipe(
            samples, repeat, confidence, vocabulary, divergence, global_weight, image_clusters, largest, clusters,
            spread, neighbours, batch,
        )  # fmt: skip
        files = [] if images is None else _image_files(images)
        loaded, processor = load_model(model, dtype, device_map, attn)
        prompt = prompt_for(processor, question, prompt_template)
        pictures = _scenes(scenes, seed) if scenes else map(open_image, files)
        builder = Builder(loaded, family_of(loaded), recipe, pad_id(loaded))
        for picture in _with_progress(pictures, scenes or len(files)):
            builder.add(dict(model_inputs(processor, picture, prompt).to(loaded.device, loaded.dtype)))
        book = builder.codebook(Path(model).name if Path(model).is_dir() else model)
        book.built["question"] = question
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            book.save(out)
        except OSError as error:
            raise InputError(f"cannot write {str(out)!r}: {error.strerror}") from error
    count, width = book.prototypes.shape
    if as_json:
        about = {"model": book.model, "projector": book.projector, **book.built}
        print_json({"codebook": str(out), "prototypes": count, "width": width, **about})
    else:
        steps = ", ".join(f"{n} {step.replace('_', ' ')}" for step, n in builder.counts.items())
        print(f"{count} prototypes of width {width} in {out}\n{steps}")


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"no folder at {str(folder)!r}")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not files:
        raise InputError(f"no images in {str(folder)!r}: they end in {', '.join(_SUFFIXES)}")
    return files


def _scenes(count: int, seed: int) -> Iterator[Image.Image]:
    from foveate.nano.scenes import scenes

    return (scene.image for scene in scenes(seed, count, "train"))


def _with_progress(pictures: Iterator[Image.Image], total: int) -> Iterator[Any]:
    columns = (TextColumn("testing tokens"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield from progress.track(pictures, total=total)
