from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import foveate as library


def test_methods(foveate: Any) -> None:
    rows = foveate("methods", "--json").json
    assert [row["name"] for row in rows] == library.list_methods()
    (row,) = (row for row in rows if row["name"] == "vispruner")
    assert row["parameters"]["keep"] is None
    assert row["parameters"]["important_ratio"] == "0.5"
    assert row["paper"] == "arXiv:2412.01818"
    assert [r["name"] for r in foveate("methods", "*pruner", "--json").json] == ["vispruner"]
    assert "vispruner" in foveate("methods").out


def test_families(foveate: Any) -> None:
    rows = foveate("families", "--json").json
    assert [row["name"] for row in rows] == library.list_families()
    assert all(isinstance(row["model_types"], list) for row in rows)
    assert "llava_next" in foveate("families").out


def test_scenes(foveate: Any, tmp_path: Path) -> None:
    pytest.importorskip("foveate.nano.scenes")
    data = foveate("scenes", "--out", "drawn", "--n", 3, "--json").json
    assert len(data["scenes"]) == 3
    for row in data["scenes"]:
        assert Image.open(row["image"]).mode == "RGB"
        assert all({"text", "answer", "kind"} == set(question) for question in row["questions"])
    assert json.loads((tmp_path / "drawn" / "scenes.json").read_text()) == data["scenes"]
    result = foveate("scenes", "--split", "nonsense")
    assert (result.code, result.out) == (2, "")
    assert "nonsense" in result.err
