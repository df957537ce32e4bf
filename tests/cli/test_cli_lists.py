from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import foveate as library
from foveate import projectors


def test_methods(foveate: Any) -> None:
    rows = foveate("methods", "--json").json
    assert [row["name"] for row in rows] == library.list_methods()
    (row,) = (row for row in rows if row["name"] == "vispruner")
    assert row["parameters"]["keep"] == {}
    assert row["parameters"]["important_ratio"] == {"default": 0.5}
    assert row["paper"] == "arXiv:2412.01818"
    assert row["complexity"] == "O(N^2 C + rounds N^2)"
    assert all(row["complexity"] for row in rows)
    assert [r["name"] for r in foveate("methods", "visp*", "--json").json] == ["vispruner"]
    shown = foveate("methods").out
    assert "vispruner" in shown
    assert "O(N^2 C + rounds N^2)" in shown
    reads = {row["name"]: row["reads"] for row in rows}
    assert (reads["uniform"], reads["random"]) == (["the grid"], [])
    assert reads["hiprune"] == ["attention", "the grid"]
    assert "reads attention, the grid; runs on" in shown


@pytest.mark.parametrize("options", [(), ("--json",)], ids=str)
def test_no_such_method(foveate: Any, options: tuple[str, ...]) -> None:
    result = foveate("methods", "nosuch", *options)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: no method matches 'nosuch'; there are: agilepruner, ")
    assert result.err.count("\n") == 1


def test_projectors(foveate: Any) -> None:
    rows = foveate("projectors", "--json").json
    assert [row["name"] for row in rows] == projectors.list_projectors()
    assert {row["stage"] for row in rows} == {"projector"}
    (row,) = foveate("projectors", "token*", "--json").json
    assert (row["name"], row["paper"], row["parameters"]["scale"]) == (
        "tokenpacker",
        "arXiv:2407.02392",
        {"default": 2},
    )
    assert "quecc(kernel=4" in (shown := foveate("projectors").out)
    assert "asks for the question" in shown
    result = foveate("projectors", "nosuch")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: no projector matches 'nosuch'; there are: average_pool, ")


def test_families(foveate: Any) -> None:
    rows = foveate("families", "--json").json
    assert [row["name"] for row in rows] == library.list_families()
    assert all(isinstance(row["model_types"], list) for row in rows)
    refused = {kind: why for row in rows for kind, why in row["refuses"].items()}
    assert "projects encoded images itself" in refused["llama4"]
    shown = foveate("families").out
    assert "llava_next" in shown
    assert all(f"generic refuses {kind}: it " in shown for kind in refused)


def test_table(foveate: Any) -> None:
    from foveate.cli.compatibility import MARKS
    from foveate.core.probes import LayerProbe
    from foveate.core.reducer import declared
    from foveate.families import all_families
    from foveate.registry import by_default

    data = foveate("table", "--json").json
    assert [f["name"] for f in data["families"]] == library.list_families()
    assert [m["name"] for m in data["methods"]] == [n for n in library.list_methods() if n != "chain"]
    for row in data["methods"]:
        method = by_default(row["name"])
        for name, family in all_families().items():
            refused = family.lacks(method) is not None or (method.video_only and "video" not in family.kinds)
            assert (row["families"][name] == "no") == refused
            layers = any(isinstance(probe, LayerProbe) for probe in declared(method, "needs"))
            some = (declared(method, "reads_grid") or layers) and name == "generic"
            assert (row["families"][name] == "some") == (not refused and some)
    rows = {r.split("|")[1].strip(): r for r in foveate("table").out.splitlines() if r.startswith("| `")}
    assert rows["`fastervlm`"].rstrip(" |").endswith(MARKS["some"])
    assert rows["`tome`"].rstrip(" |").endswith(MARKS["no"])
    assert rows["`uniform`"].rstrip(" |").endswith(MARKS["some"])


def test_scenes(foveate: Any, tmp_path: Path) -> None:
    data = foveate("scenes", "--out", "drawn", "--n", 3, "--json").json
    assert len(data["scenes"]) == 3
    for row in data["scenes"]:
        assert Image.open(row["image"]).mode == "RGB"
        assert all({"text", "answer", "kind"} == set(question) for question in row["questions"])
    assert json.loads((tmp_path / "drawn" / "scenes.json").read_text()) == data["scenes"]
    result = foveate("scenes", "--split", "nonsense")
    assert (result.code, result.out) == (2, "")
    assert "nonsense" in result.err


def test_nano_commands_need_a_model(foveate: Any, tmp_path: Path) -> None:
    result = foveate("nano", "eval", "--model", tmp_path)
    assert (result.code, result.out) == (2, "")
    assert "foveate nano train" in result.err


def test_nano_commands_say_what_is_wrong(foveate: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    for arguments in (
        ("train", "--recipe", "absent.json"),
        ("train", "--recipe", "bad.json"),
        ("train", "--out", "bad.json"),
        ("report", "absent.json", "absent.md"),
    ):
        result = foveate("nano", *arguments)
        assert (result.code, result.out) == (2, "")
        assert result.err.count("\n") == 1


def test_missing_nano_weights(foveate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from foveate import nano

    monkeypatch.setattr(nano, "WEIGHTS", tmp_path / "nowhere")
    Image.new("RGB", (8, 8)).save("x.png")
    result = foveate("run", "x.png", "what ?")
    assert (result.code, result.out) == (2, "")
    assert "weights of nano are missing" in result.err


def test_help_shows_defaults_that_are_written_by_hand(foveate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = foveate("run", "--help").out
    assert "[default: the method's own, or 0.25]" in shown
    assert "[default: runs/IMAGE-METHOD]" in shown
