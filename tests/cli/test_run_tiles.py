from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tiny_families import TINIES
from tiny_processors import IMAGE_TOKENS, PROCESSORS


@pytest.fixture(params=list(PROCESSORS))
def tiled_folder(request: Any, tmp_path: Path) -> Path:
    """A model of a family of tiles with its processor, saved as a folder."""
    processor, model = PROCESSORS[request.param](), TINIES[request.param].build()
    model.config.image_token_id = processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKENS[request.param])
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_run_on_tiles(foveate: Any, tiled_folder: Path, photo: Path) -> None:
    args = ["--method", "vispruner", "--keep", "9", "--model", tiled_folder, "--repeats", "1", "--compare"]
    result = foveate("run", photo, "what is this", *args, "--max-new-tokens", "3", "--json", "--out", "shown")
    assert result.code == 0, result.err
    (span,) = result.json["tokens"]["spans"]
    tiles = span["grid"][0]
    assert tiles > 2
    assert span["before"] == 16 * tiles
    assert span["after"] == 9
    assert all(flops > 0 for flops in result.json["flops"].values())
    assert Path("shown/overlay.png").stat().st_size > 10_000
    assert len(result.json["compare"]) == 6


@pytest.mark.parametrize("tiled_folder", ["aya_vision"], indirect=True)
def test_view_of_tiles_has_a_panel_for_the_overview_and_one_for_them(
    foveate: Any, tiled_folder: Path, photo: Path
) -> None:
    args = ["--method", "prumerge", "--keep", "9", "--keep", "20", "--model", tiled_folder, "--repeats", "1"]
    result = foveate("view", photo, "what is this", *args, "--max-new-tokens", "3", "--json", "--out", "shown")
    assert result.code == 0, result.err
    (method,) = result.json["methods"]
    for arm in method["arms"]:
        assert sum(arm["counts"].values()) == result.json["tokens"]["visual"] == len(arm["into"][0])
    page = Path("shown/view.html").read_text(encoding="utf-8")
    assert '"label": "overview"' in page
    assert re.search(r'"label": "\d+ tiles"', page)
