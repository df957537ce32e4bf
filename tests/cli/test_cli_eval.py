from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from foveate.cli.eval import OPTIONS
from foveate.eval import leaderboard


@pytest.mark.parametrize(("arguments", "fault"), [
    (["--keep", "64,x"], "64,32,16"),
    (["--keep", "0"], "at least one token"),
    (["--keep", "256"], "nothing to reduce"),
    (["--methods", "nothing"], "no method is called 'nothing'"),
    (["--images", "30"], "multiple of"),
    (["--page", "nowhere.md"], "no page at"),
    (["--tasks", "gqa"], "an option of --harness lmms-eval, not of --harness scenes: leave out --tasks"),
    (["--dtype", "auto"], "leave out --dtype"),
    (["--harness", "lmms-eval", "--tasks", "gqa", "--method", "vispruner"], "--keep 64"),
    (["--harness", "lmms-eval"], "--tasks"),
    (["--harness", "lmms-eval", "--tasks", "gqa", "--keep", "32"], "keep has no meaning without a method"),
    (["--harness", "lmms-eval", "--tasks", "gqa", "--images", "25"], "leave out --images"),
    (["--harness", "lmms-eval", "--tasks", "gqa", "--seed", "0"], "leave out --seed"),
    (["--harness", "lmms-eval", "--tasks", "gqa", "--processes", "2"], "leave out --processes"),
    (["--harness", "lmms-eval", "--tasks", "gqa", "--page", "page.md"], "leave out --page"),
    (["--harness", "lmms-eval", "--published", "fastv"], "--published and --harness lmms-eval do not go together"),
    (["--published", "fastv", "--backbone", "dinov2"], "--backbone and --published do not go together"),
    (["--published", "fastv", "--methods", "fastv"], "leave out --methods"),
    (["--published", "fastv", "--keep", "32"], "leave out --keep"),
    (["--published", "fastv", "--out", "x.json"], "leave out --out"),
    (["--published", "fastv", "--harness", "scenes"], "leave out --harness"),
    (["--backbone", "dinov2", "--processes", "2"], "leave out --processes"),
    (["--backbone", "dinov2", "--methods", "own.json"], "give --keep"),
    (["--against-paper", "nowhere.json", "--images", "25"], "leave out --images"),
    (["--against-paper", "nowhere.json", "--model", "nano"], "leave out --model"),
    (["--published", "nothing"], "no numbers of 'nothing'"),
    (["--against-paper", "nowhere.json"], "neither a leaderboard"),
])  # fmt: skip
def test_mistakes_are_one_line(foveate: Any, arguments: list[str], fault: str):
    result = foveate("eval", *arguments)
    assert result.code == 2
    line = result.err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert fault in line
    assert result.out == ""


def test_a_wrong_number_of_images_is_refused_before_anything_is_loaded(foveate: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("foveate.nano.load", lambda: pytest.fail("nano was loaded"))
    assert "multiple of" in foveate("eval", "--images", "30").err


def test_every_option_belongs_to_a_way_to_use_the_command():
    from foveate.cli import app

    known = {parameter.name for parameter in get_command(app).commands["eval"].params}
    assert {name for options in OPTIONS.values() for name in options} == known - {"as_json", "help"}


def test_published_numbers_are_listed(foveate: Any):
    rows = foveate("eval", "--published", "vispruner", "--json").json
    assert {"method", "model", "budget", "benchmark", "value", "unit", "source", "known", "verified"} <= set(rows[0])
    assert {row["method"] for row in rows} == {"vispruner"}
    shown = foveate("eval", "--published", "fastv").out
    assert "arXiv:2403.06764" in shown
    assert "K=2, R=50%" in shown
    assert len(foveate("eval", "--published", "all", "--json").json) > 1000


def test_runs_are_shown_beside_papers(foveate: Any):
    method = {"method": "vispruner", "keep": 64}
    about = {"model": "llava-hf/llava-1.5-7b-hf", "method": method, "tasks": {"pope": {"kept_tokens": 64.0}}}
    Path("run.json").write_text(json.dumps({"results": {"pope": {"pope_f1_score,none": 0.801}}, "foveate": about}))
    shown = foveate("eval", "--against-paper", "run.json").out
    assert "80.1" in shown
    assert "80.4" in shown
    pairs = foveate("eval", "--against-paper", "run.json", "--json").json
    assert {"ours", "published", "source", "known", "verified"} <= set(pairs[0])


def _board() -> dict[str, Any]:
    gap = {"method": "random", "points": 3.0, "error": 1.0, "p": 0.0002}
    kinds = ("exist", "color", "shape", "where", "at", "count", "relation", "read")
    row = {
        "method": "vispruner", "budget": 16, "tokens": 16.0, "relative": {"average": 90.12, "error": 0.5},
        "worst": {"kind": "count", "relative": 70.0}, "kinds": {kind: {"relative": 90.0} for kind in kinds},
        "loyalty": {"agreement": 88.0, "error": 1.0}, "cost": {"of_unpruned": 0.5, "kv_of_unpruned": 0.1},
        "against": {"random": gap},
    }  # fmt: skip
    share = {"all": {"accuracy": 97.0, "error": 0.4}}
    config = {"questions": 100, "images": 25, "seed": 0, "visual_tokens": 256, "draws": 3, "budgets": [16]}
    left_out = [{"method": "evs", "budgets": [16], "reason": "evs leaves images alone"}]
    return {"config": config, "unpruned": share, "blind": share, "rows": [row], "left_out": left_out}


def test_one_command_fills_the_page_and_draws_the_plot(foveate: Any, monkeypatch: pytest.MonkeyPatch):
    called: list[Any] = []

    def made(
        methods: Any, budgets: Any, images: int, seed: int, rows: Path, processes: int, progress: Any, variants: Any
    ) -> Any:  # fmt: skip
        assert variants == []
        called.append((methods, budgets, images, seed, rows, processes))
        progress(5, 10)
        return _board()

    monkeypatch.setattr(leaderboard, "leaderboard", made)
    Path("page.md").write_text(
        "# Board\n<!-- leaderboard-about -->\n<!-- /leaderboard-about -->\n"
        "<!-- leaderboard-16 -->\nold\n<!-- /leaderboard-16 -->\nend\n"
    )
    arguments = ["eval", "--methods", "vispruner, mmr", "--keep", "16,16", "--out", "board.json", "--page", "page.md"]
    result = foveate(*arguments)
    assert result.code == 0
    assert called == [(["vispruner", "mmr"], [16], 300, 0, Path("board.rows.jsonl"), 1)]
    assert "90.1 ± 0.5" in result.out
    assert "left out: evs at 16 tokens: evs leaves images alone" in result.out
    page = Path("page.md").read_text()
    assert "old" not in page
    assert "| `vispruner` | 16 | 90.1 ± 0.5 |" in page
    assert page.endswith("end\n")
    assert "<svg" in Path("images/page.svg").read_text()
    assert json.loads(Path("board.json").read_text()) == _board() == foveate(*arguments, "--json").json
    foveate("eval", "--methods", "own.json")
    assert called[-1][:2] == (["own.json"], None)
    Path("page.md").write_text("nothing")
    assert "has no place for" in foveate(*arguments).err
