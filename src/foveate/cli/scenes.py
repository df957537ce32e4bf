"""The command that draws scenes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.tools import Json, guarded, make_folder, print_json, write_json
from foveate.core.errors import InputError


@guarded
def scenes(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("scenes"),
    n: Annotated[int, typer.Option("--n", min=1, help="How many.")] = 8,
    seed: Annotated[int, typer.Option(help="Different seeds give different scenes.")] = 0,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "validation",
    as_json: Json = False,
) -> None:
    """Write drawn scenes with questions and answers to a folder."""
    from foveate.nano.scenes import scenes as draw_scenes

    folder, rows, lines = make_folder(out, ""), [], []
    try:
        for scene in draw_scenes(seed, n, split):
            path = folder / f"{scene.split}-{scene.seed}-{scene.index:05d}.png"
            scene.image.save(path)
            asked = [{"text": q.text, "answer": q.answer, "kind": q.kind} for q in scene.questions]
            objects = [{"kind": o.kind, "color": o.color, "box": list(o.box)} for o in scene.objects]
            rows.append({"image": str(path), "background": scene.background, "objects": objects, "questions": asked})
            lines += [{"image": path.name, "question": q["text"], "answer": q["answer"]} for q in asked]
        (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    write_json(folder / "scenes.json", rows)
    if as_json:
        print_json({"folder": str(folder), "scenes": rows})
    else:
        print(f"{len(rows)} scenes with {len(lines)} questions in {folder}, listed in scenes.json and questions.jsonl")
