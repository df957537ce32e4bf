from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import foveate as library
from foveate.viz import sheet
from foveate.viz.comparison import reads

FAST = ("--repeats", 1, "--max-new-tokens", 2)


def _data(page: str) -> dict[str, Any]:
    found = re.search(r"^const DATA = (.*);$", page, re.MULTILINE)
    assert found
    return json.loads(found[1])


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("view")


def test_view_writes_a_sheet_and_a_page(foveate: Any, folder: Path, photo: Path, out: Path) -> None:
    result = foveate(
        "view", photo, "what is <b>this</b> ?", "--model", folder, "--method", "vispruner", "--method", "tome",
        "--method", "divprune", "--keep", "0.5", "--keep", "8", "--out", out, "--json", *FAST,
    )  # fmt: skip
    assert result.code == 0, result.err
    data = result.json
    assert data == json.loads((out / "view.json").read_text())
    assert data["budgets"] == ["8", "0.5"], "from few tokens to many"
    assert [method["name"] for method in data["methods"]] == ["vispruner", "tome", "divprune"]
    for method in data["methods"]:
        assert [arm["tokens"] for arm in method["arms"]] == [8, 32]
        for i, arm in enumerate(method["arms"]):
            assert sum(arm["counts"].values()) == 64
            assert set(arm["kept"][0]) <= {j for j, first in enumerate(method["order"][0]) if 0 <= first <= i}
            lost = {j for j, first in enumerate(method["order"][0]) if 0 <= first < i} - set(arm["kept"][0])
            assert arm["left_again"] == len(lost)
    by_name = {method["name"]: method["arms"][0] for method in data["methods"]}
    assert by_name["tome"]["counts"] == {"kept": 8, "merged": 56, "dropped": 0}
    assert by_name["vispruner"]["counts"] == {"kept": 8, "merged": 0, "dropped": 56}
    assert len(by_name["vispruner"]["saliency"][0]) == 64
    assert by_name["divprune"]["saliency"] is None
    assert by_name["vispruner"]["method"] == repr(library.VisPruner(keep=8))
    assert Image.open(data["picture"]).width > 1000
    page = Path(data["page"]).read_text(encoding="utf-8")
    assert "<b>this" not in page
    assert not re.search(r"(src|href)=|url\(|https?:|@import|fetch\(", page), "the page needs nothing else"
    inside = _data(page)
    assert inside["methods"][0]["arms"][0]["kept"] == data["methods"][0]["arms"][0]["kept"]
    (panel,) = inside["panels"]
    assert panel["picture"].startswith("data:image/")
    assert (panel["width"], panel["height"]) == (80, 80), "what the encoder sees of 120 x 80"
    assert [cell[:3] for cell in panel["cells"][:9]] == [[i, 1 + i // 8, 1 + i % 8] for i in range(9)]
    assert panel["cells"][63][3:] == [70, 70, 10, 10]


def test_methods_inside_the_llm(
    foveate: Any, folder: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    drawn: list[Any] = []
    draw = sheet.sheet
    monkeypatch.setattr(sheet, "sheet", lambda comparison: drawn.append(draw(comparison)) or drawn[0])
    for name in ("fastv", "text_interaction", "topv"):
        library.load_reducer(name, keep=0.5, layer=1).save(tmp_path / f"{name}.json")
    methods = ("vispruner", "divprune", "fastv.json", "text_interaction.json", "topv.json")
    given = [part for name in methods for part in ("--method", name)]
    result = foveate(
        "view", photo, "what is this ?", "--model", folder, *given, "--keep", 0.25, "--out", tmp_path, *FAST
    )
    assert result.code == 0, result.err
    data = json.loads((tmp_path / "view.json").read_text())
    arms = [method["arms"][0] for method in data["methods"]]
    assert (arms[0]["tokens"], arms[2]["tokens"]) == (16, 16)
    assert (arms[0]["equivalent_tokens"], arms[2]["equivalent_tokens"]) == (16, 40)
    page = (tmp_path / "view.html").read_text(encoding="utf-8")
    assert "mean over layers" in result.out
    assert page.count("mean over layers</th>") == 1
    for arm in arms:
        assert f"{arm['equivalent_tokens']:.1f}" in result.out
        assert f'<td class="number">{arm["equivalent_tokens"]:.1f}</td>' in page
    inside = "attention inside the LLM"
    assert [arm["reads"] for arm in arms] == [
        "attention of the vision encoder", "no attention", inside, inside, "no attention",
    ]  # fmt: skip
    assert [arm["reads"] for arm in (m["arms"][0] for m in _data(page)["methods"])] == [arm["reads"] for arm in arms]
    words = [text.get_text() for text in drawn[0].texts]
    assert words.count("mean over layers: 40.0 tokens") == 2
    titles = [axes.get_title(loc="left") for axes in drawn[0].axes]
    assert titles.count(f"reads {inside}") == titles.count("reads no attention") == 2


def test_methods_before_the_llm_have_no_mean_over_layers(foveate: Any, folder: Path, photo: Path, out: Path) -> None:
    result = foveate("view", photo, "what is this ?", "--model", folder, "--keep", 8, "--out", out, *FAST)
    assert "mean over layers" not in result.out
    assert "mean over layers</th>" not in (out / "view.html").read_text(encoding="utf-8")


def test_what_is_read_in_any_stage() -> None:
    chain = library.Chain(library.load_reducer("divprune", keep=32), library.load_reducer("fastv", keep=8))
    assert reads(SimpleNamespace(reducer=chain, saliency=None)) == "attention inside the LLM"
    assert reads(SimpleNamespace(reducer=None, saliency=None)) == "no attention"


def test_view_prints_a_table_and_takes_files_of_methods(
    foveate: Any, folder: Path, photo: Path, tmp_path: Path
) -> None:
    library.VisPruner(keep=3, order="rank").save(tmp_path / "rank.json")
    result = foveate("view", photo, "what is this ?", "--model", folder, "--method", "rank.json", "--keep", 4, *FAST)
    assert result.code == 0, result.err
    assert "rank.json" in result.out
    assert "picture  runs/photo-view/view.png" in result.out
    arm = json.loads(Path("runs/photo-view/view.json").read_text())["methods"][0]["arms"][0]
    assert arm["method"] == repr(library.VisPruner(keep=4, order="rank"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "give an image file and a question"),
        (("{photo}",), "give an image file and a question"),
        (("nowhere.png", "what ?"), "no image file"),
        (("{photo}", "what ?", "--keep", "16", "--keep", "16"), "the budget '16' is asked for twice"),
        (("{photo}", "what ?", "--method", "tome", "--method", "tome"), "the method 'tome' is asked for twice"),
        (("{photo}", "what ?", "--method", "nope"), "no method is called 'nope'"),
        (("{photo}", "what ?", "--keep", "0"), "keep at least 1"),
        (("{photo}", "what ?", "--keep", "16,8"), "2 budgets, but the prompt has 1 image"),
        (("{photo}", " "), "the question is empty"),
        (("--app", "--json"), "leave out --json"),
        (("--app", "--model", "nowhere"), "no model 'nowhere'|pip install"),
    ],
)
def test_mistakes_end_with_one_line(foveate: Any, photo: Path, args: tuple[str, ...], message: str) -> None:
    result = foveate("view", *(arg.format(photo=photo) for arg in args))
    assert result.code == 2
    lines = [line for line in result.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines


def test_the_app_without_gradio_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "gradio.py").write_text("raise ImportError('no gradio')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from foveate.cli import app; app(['view', '--app'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert 'error: the app needs gradio: pip install "foveate[app]"' in done.stderr
