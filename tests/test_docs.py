"""The documentation states what the repository holds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import record_classes
from foveate.bench.check.tables import markdown as check_table
from foveate.bench.growth import growth_table
from foveate.bench.tables import markdown as speed_table
from foveate.cli import compatibility
from foveate.cost.figures import markdown as cost_table
from foveate.eval import backbone, leaderboard
from foveate.eval.leaderboard import table_rows
from foveate.eval.published import UNPRUNED
from foveate.eval.scenes import BLOCK, Entry, collect, draws
from foveate.measure.baselines import BASELINES
from foveate.registry import get_method, load_reducer
from foveate.tune.candidates import BUDGETS, METHODS
from foveate.tune.findings import markdown as tune_table
from training.nano import excerpt, guiding
from training.nano.card import tables

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def test_the_readme_shows_the_leaderboard_in_brief():
    table = excerpt.table(leaderboard.load(ROOT / "results/leaderboard.json"))
    shown = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"<!-- {excerpt.MARKER} -->\n{table}\n<!-- /{excerpt.MARKER} -->" in shown


def test_the_page_on_gaze_shows_the_leaderboard_and_the_ablation():
    shown = (ROOT / "docs/gaze.md").read_text(encoding="utf-8")
    table = excerpt.gaze_table(leaderboard.load(ROOT / "results/leaderboard.json"))
    assert f"<!-- {excerpt.GAZE_MARKER} -->\n{table}\n<!-- /{excerpt.GAZE_MARKER} -->" in shown
    for name, text in leaderboard.tables(leaderboard.load(ROOT / "results/gaze-ablation.json")).items():
        assert f"<!-- {name} -->\n{text}\n<!-- /{name} -->" in shown


def test_the_page_on_rectifying_shows_the_results():
    shown = (ROOT / "docs/rectify.md").read_text(encoding="utf-8")
    for name, text in excerpt.rectify_tables(leaderboard.load(ROOT / "results/rectify.json")).items():
        assert f"<!-- {name} -->\n{text}\n<!-- /{name} -->" in shown


def test_the_table_of_methods_and_families_is_current():
    shown = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    measured = json.loads((ROOT / "results/compatibility-callers.json").read_text(encoding="utf-8"))
    command = "foveate table --callers results/compatibility-callers.json > docs/compatibility.md"
    assert shown == compatibility.page(measured), f"run: {command}"


def test_the_table_of_classes_is_current():
    data = json.loads((ROOT / "results/compatibility-classes.json").read_text(encoding="utf-8"))
    shown = f"<!-- classes -->\n{record_classes.markdown(data)}\n<!-- /classes -->"
    assert shown in (ROOT / "docs/families.md").read_text(encoding="utf-8"), "run: tests/record_classes.py --docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_way_through_the_files_names_each_of_them_once():
    page = (ROOT / "docs/how-it-works.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+(?:\.py|/))`", page)
    files = [name for name in named if name.endswith(".py")]
    assert len(files) > 30
    assert [name for name in named if not (ROOT / "src/foveate" / name).exists() and name != "src/foveate/"] == []
    assert sorted(set(files)) == sorted(files)
    inside = {str(path.relative_to(ROOT / "src/foveate")) for path in (ROOT / "src/foveate/engines").rglob("*.py")}
    assert {name for name in inside if not name.endswith("__init__.py")} <= set(files)


def test_methods_that_select_slowly_explain_it():
    result = json.loads((ROOT / "results/selection.json").read_text(encoding="utf-8"))
    slow = {row["method"] for row in result["rows"] if row["tokens"] == 576 and row["of_vispruner"] > 3}
    assert slow, "the file holds no timings"
    for name in slow:
        text = get_method(name).__doc__ or ""
        assert re.search(r"``O\(|\bcosts?\b|decomposition|eigh|svdvals", text), f"{name} does not say what it costs"


def test_vispruner_is_as_fast_as_stated():
    plain = json.loads((ROOT / "results/selection.json").read_text(encoding="utf-8"))["vispruner_against_plain_loop"]
    assert plain["identical"] == plain["inputs"] == 200
    assert f"{plain['ratio_of_medians']:.1f} times" in (ROOT / "docs/measuring.md").read_text(encoding="utf-8")


def test_the_table_of_growth_is_that_of_the_results():
    result = json.loads((ROOT / "results/selection-growth.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/measuring.md").read_text(encoding="utf-8")
    assert f"<!-- selection-growth -->\n{growth_table(result)}\n<!-- /selection-growth -->" in page
    rounds, loops = result["vispruner_rounds"], result["plain_loops"]
    assert f"{100 * rounds['kept_by_both']:.1f} % of the" in page
    assert f"{100 * rounds['kept_by_8_with_noise']:.1f} % themselves" in page
    ratios: dict[str, list[str]] = {}
    for row in loops:
        ratios.setdefault(row["method"], []).append(f"{row['ours_of_plain']:.2f}")
    assert len(ratios) == 6
    for method, (small, large) in ratios.items():
        assert f"| `{method}` | {small} | {large} " in page


def test_the_model_card_shows_the_results():
    names = ("nano", "nano-seed1", "nano-seed2")
    results = [json.loads((ROOT / f"results/{name}.json").read_text(encoding="utf-8")) for name in names]
    page = (ROOT / "docs/nano.md").read_text(encoding="utf-8")
    for name, shown in tables(results).items():
        assert f"<!-- nano-{name} -->\n{shown}\n<!-- /nano-{name} -->" in page


def test_the_page_on_costs_shows_the_results():
    names = [
        "llava-1.5-7b", "llava-1.5-13b", "llava-next-7b", "llava-onevision-7b", "qwen2.5-vl-7b", "qwen3-vl-8b",
        "internvl3-8b",
    ]  # fmt: skip
    results = [json.loads((ROOT / f"results/cost-{name}.json").read_text(encoding="utf-8")) for name in names]
    page = (ROOT / "docs/cost.md").read_text(encoding="utf-8")
    assert f"<!-- cost-table -->\n{cost_table(results)}\n<!-- /cost-table -->" in page


def test_the_page_on_speed_shows_the_results():
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    files = sorted(ROOT.glob("results/bench-*.json"))
    assert files
    for file in files:
        shown = speed_table(json.loads(file.read_text(encoding="utf-8")))
        assert f"<!-- {file.stem} -->\n{shown}\n<!-- /{file.stem} -->" in page, f"run: foveate bench report {file}"


def test_the_page_on_checking_shows_the_results():
    page = (ROOT / "docs/check.md").read_text(encoding="utf-8")
    files = sorted(ROOT.glob("results/check-*.json"))
    assert files
    for file in files:
        result = json.loads(file.read_text(encoding="utf-8"))
        assert "wrong" not in {verdict["verdict"] for verdict in result["verdicts"]}
        due = f"<!-- {file.stem} -->\n{check_table(result)}\n<!-- /{file.stem} -->"
        assert due in page, "fill it with foveate.bench.check.tables.write_report"
    assert any(json.loads(file.read_text(encoding="utf-8"))["config"]["device"] != "cpu" for file in files) or (
        "**No GPU has run this command yet.**" in page
    )


@pytest.mark.parametrize(("file", "tables_of"), [
    ("leaderboard", leaderboard.tables),
    ("backbone", backbone.tables),
])  # fmt: skip
def test_the_leaderboard_shows_the_results(file, tables_of):
    result = json.loads((ROOT / f"results/{file}.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/leaderboard.md").read_text(encoding="utf-8")
    for name, shown in tables_of(result).items():
        assert f"<!-- {name} -->\n{shown}\n<!-- /{name} -->" in page


def test_the_leaderboard_follows_from_the_answers(monkeypatch):
    monkeypatch.setattr("foveate.eval.scenes._block", lambda *_: pytest.fail("the file of answers lacks some"))
    result = json.loads((ROOT / "results/leaderboard.json").read_text(encoding="utf-8"))
    for line in (ROOT / "results/leaderboard.rows.jsonl").read_text(encoding="utf-8").splitlines():
        assert len(json.loads(line)["right"]) == BLOCK
    config = result["config"]
    named = {row["method"]: row for row in result["rows"] if row["budget"] == config["budgets"][-1]}
    kept = [Entry(UNPRUNED), *(Entry(n, config["budgets"][-1], draws(load_reducer(n, keep=config["budgets"][-1])))
            for n in (*BASELINES, "vispruner", "divprune"))]  # fmt: skip
    answers = collect(kept, config["images"], config["seed"], ROOT / "results/leaderboard.rows.jsonl")
    for row in table_rows(kept, answers, {}):
        for figure in ("tokens", "accuracy", "kinds", "relative", "worst", "loyalty", "commits"):
            assert row[figure] == named[row["method"]][figure], (row["method"], figure)


def test_the_page_on_tuning_shows_the_results_and_the_defaults():
    page = (ROOT / "docs/tune.md").read_text(encoding="utf-8")
    result = json.loads((ROOT / "results/tune-nano.json").read_text(encoding="utf-8"))
    assert f"<!-- tune-nano -->\n{tune_table(result)}\n<!-- /tune-nano -->" in page
    shown = re.search(r"^foveate tune scenes/.*\\\n.*", page, re.MULTILINE)
    assert shown
    assert result["command"].split() == shown[0].replace("\\", "").split()
    tried = page.partition("## What is tried")[2].partition("as far as")[0]
    assert re.findall(r"`(\w+)`", tried) == list(METHODS)
    assert re.findall(r"0\.\d+", tried) == list(BUDGETS)


def test_the_page_of_guides_and_exits_shows_the_results():
    result = json.loads((ROOT / "results/nano-inside.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/guiding.md").read_text(encoding="utf-8")
    for name, shown in guiding.tables(result).items():
        assert f"<!-- {name} -->\n{shown}\n<!-- /{name} -->" in page


def test_the_table_of_conditioning_is_that_of_the_results() -> None:
    result = json.loads((ROOT / "results/conditioning.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8").partition("## Conditioning")[2]
    shown = re.findall(r"^\| `(\S+)` \| (.+) \|$", page, re.MULTILINE)
    changes = ("channels", "noise", "threads", "batch")
    due = [(row["method"], " | ".join(f"{100 * row[c]['same']:.4g} %" for c in changes)) for row in result["rows"]]
    assert shown == due
    assert f"({result['config']['seeds']} pictures)" in page
