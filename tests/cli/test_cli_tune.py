from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from transformers import AutoProcessor, LlavaForConditionalGeneration

import foveate as library
from foveate.tune.prompts import read_prompts

FAST = ("--methods", "vispruner,fastv,downsample", "--keep", "0.5,4", "--start", 4, "--max-new-tokens", 2)
QUESTIONS = ("what is this ?", "is this a red square ?", "where is a circle ?")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place, lines = tmp_path_factory.mktemp("prompts"), []
    for i in range(4):
        image = Image.new("RGB", (64, 64), (60 * i, 30, 200))
        ImageDraw.Draw(image).rectangle((8 * i, 10, 8 * i + 20, 30), fill="gold")
        image.save(place / f"{i}.png")
        lines += [{"image": f"{i}.png", "question": question} for question in QUESTIONS]
    path = place / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_tune_writes_a_configuration_that_the_library_takes(
    foveate: Any, folder: Path, photo: Path, prompts: Path, tmp_path: Path
) -> None:
    args = ("tune", prompts, "--model", folder, "--speedup", 1.2, "--by", "flops", "--json", *FAST)
    result = foveate(*args)
    assert result.code == 0, result.err
    data, out = result.json, Path("runs/mine-tune")
    assert {path.name for path in out.iterdir()} == {
        "config.json", "report.json", "report.md", "pareto.png", "rows.jsonl"
    }  # fmt: skip
    files = data.pop("files")
    assert data == json.loads((out / "report.json").read_text())
    assert Image.open(files["plot"]).width > 1000
    assert (out / "report.md").read_text().startswith(f"{data['winner']} fulfils the wish")
    best = next(row for row in data["candidates"] if row["candidate"] == data["winner"])
    assert best["rungs"][-1]["prompts"] == data["prompts"] == 12
    assert best["rungs"][-1]["flops"] <= 1 / 1.2
    assert data["rungs"] == [4, 8, 12]
    assert not data["labelled"]
    assert {row["candidate"] for row in data["candidates"]} >= {"random 4", "uniform 0.5", "pool 4", "vispruner 0.5"}
    reducer = library.load_reducer(files["config"])
    assert reducer.to_dict() == data["reducer"]
    assert repr(reducer) == best["method"]
    model, processor = LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor(images=Image.open(photo), text="<image>\nwhat is this ?", return_tensors="pt")
    with library.attach(model, files["config"]) as handle:
        model.generate(**inputs, max_new_tokens=1)
    assert len(handle.selections[0][0].kept) < 64
    ran = foveate("run", photo, "what is this ?", "--model", folder, "--method", files["config"], "--json")
    assert ran.code == 0, ran.err
    assert ran.json["method"] == best["method"]

    before = (out / "rows.jsonl").read_text()
    again = foveate(*args, "--out", out)
    assert again.code == 0, again.err
    assert f"going on behind {len(before.splitlines()) - 1} prompts" in " ".join(again.err.split())
    assert (out / "rows.jsonl").read_text() == before
    assert again.json["candidates"] == data["candidates"]
    other = foveate(*args, "--out", out, "--seed", 1)
    assert other.code == 2
    assert "holds a search with other settings" in other.err


def test_with_answers_accuracy_counts_and_a_missed_wish_is_told(
    foveate: Any, folder: Path, prompts: Path, tmp_path: Path
) -> None:
    labelled = prompts.with_name("labelled.jsonl")
    rows = [{**json.loads(line), "answer": "red"} for line in prompts.read_text().splitlines()]
    labelled.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "config.json").write_text("{}")
    result = foveate(
        "tune", labelled, "--model", folder, "--speedup", 1000, "--by", "flops", "--json", "--out", tmp_path, *FAST
    )
    assert result.code == 1
    data = json.loads(result.out)
    assert (data["fulfilled"], data["winner"], data["reducer"], data["files"]["config"]) == (False, None, None, None)
    assert not (tmp_path / "config.json").exists(), "no configuration of a search before"
    assert data["labelled"]
    assert data["unpruned"]["accuracy"] is not None
    last = {row["candidate"]: row["rungs"][-1] for row in data["candidates"]}
    assert data["closest"] == min(last, key=lambda name: last[name]["flops"])
    shown = foveate("tune", labelled, "--model", folder, "--speedup", 1000, "--by", "flops", "--out", tmp_path, *FAST)
    assert shown.code == 1
    assert f"The closest is {data['closest']}" in shown.out
    assert "accuracy" in shown.out


def test_scenes_are_prompts(foveate: Any, tmp_path: Path) -> None:
    assert foveate("scenes", "--n", 2, "--out", "drawn").code == 0
    scenes = json.loads(Path("drawn/scenes.json").read_text())
    read = read_prompts(Path("drawn/questions.jsonl"))
    asked = [(Path(scene["image"]), q["text"], q["answer"]) for scene in scenes for q in scene["questions"]]
    assert [(p.images[0], p.question, p.answer) for p in read] == asked


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("{prompts}",), "wish for one thing"),
        (("{prompts}", "--max-loss", "0.5", "--speedup", "2"), "wish for one thing"),
        (("{prompts}", "--max-loss", "1.5"), "a loss is a share"),
        (("{prompts}", "--speedup", "1"), "a speed-up is a factor above 1"),
        (("{prompts}", "--speedup", "2", "--confidence", "1"), "a confidence is"),
        (("{prompts}", "--max-loss", "0.01"), "12 prompts cannot show a loss of at most 1.00%"),
        (("{prompts}", "--speedup", "2", "--limit", "5"), "5 prompts tell nothing"),
        (("nowhere.jsonl", "--speedup", "2"), "cannot read prompts"),
        (("{prompts}", "--speedup", "2", "--methods", ","), "an empty list"),
        (
            ("{prompts}", "--speedup", "2", "--prompt-template", "<image>"),
            "the prompt in line .* no place for the quest",
        ),
        (("{prompts}", "--speedup", "2", "--model", "nowhere"), "no model 'nowhere'"),
        (("{prompts}", "--speedup", "2", "--model", "{folder}", "--methods", "nope"), "no method is called 'nope'"),
        (("{prompts}", "--speedup", "2", "--model", "{folder}", "--methods", "evs"), "it leaves images alone"),
        (("{prompts}", "--speedup", "2", "--model", "{folder}", "--keep", "0"), "keep at least 1"),
        (("{prompts}", "--speedup", "2", "--model", "{folder}", "--clock", "cpu", "--threads", "2"), "use 1 thread"),
    ],
)
def test_mistakes_end_with_one_line(
    foveate: Any, folder: Path, prompts: Path, args: tuple[str, ...], message: str
) -> None:
    result = foveate("tune", *(arg.format(prompts=prompts, folder=folder) for arg in args))
    assert result.code == 2
    lines = [line for line in result.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines
