"""A method in a package of its own, installed as users do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import foveate
import foveate.registry

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "plugin"
SCRIPT = """
import torch
import foveate
import foveate.registry
from foveate.core.probes import Features
from foveate.core.spans import Crop, Span
from foveate.core.tokens import VisualTokens

assert "largest_norm" in foveate.list_methods() and "vispruner" in foveate.list_methods()
reducer = foveate.load_reducer("largest_norm", keep=3, order=1.0)
assert foveate.load_reducer(foveate.registry.reducer_from_dict(reducer.to_dict())) == reducer
features = torch.tensor([5.0, 1.0, -7.0, 0.0, 6.0, 2.0])[:, None]
span = Span("image", 0, 0, torch.arange(6), (1, 2, 3), (Crop(torch.arange(6), (2, 3)),))
tokens = VisualTokens((span,), {Features(): [features]}, torch.device("cpu"))
assert reducer.select(tokens)[0].kept.tolist() == [0, 2, 4]
chain = foveate.Chain(reducer, foveate.load_reducer("largest_norm", keep=1))
assert chain.select(tokens)[0].kept.tolist() == [2]
assert repr(reducer) == "LargestNorm(keep=3, order=1.0)"

from foveate.cli import app

app(["methods", "--json"])
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that finds the package."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(EXAMPLE, folder / "source")  # building leaves files beside the sources
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet",
               "--disable-pip-version-check", "--target", str(folder / "site"), str(source)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)
    library = str(Path(foveate.__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "site"), library])}


def test_it_is_a_method_like_any_other(installed: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=installed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["largest_norm"]["parameters"] == {"keep": {}, "order": {"default": 2.0}}
    assert rows["largest_norm"]["summary"] == "Keep the tokens whose features have the largest norm."
    assert "vispruner" in rows


def test_it_is_not_there_without_its_package() -> None:
    assert "largest_norm" not in foveate.list_methods()


DIRECT = """
import sys

from foveate_largest_norm import LargestNorm

{body}
"""


@pytest.mark.parametrize(
    "body",
    [
        "LargestNorm(keep=32).save(sys.argv[1]); print(LargestNorm.name)",
        "import foveate; foveate.list_methods(); print(LargestNorm(keep=3).to_dict()['method'])",
        "import foveate; print(foveate.Chain(LargestNorm(keep=3)).to_dict()['reducers'][0]['method'])",
        "import foveate; print(foveate.load_reducer(LargestNorm(keep=3), keep=4).name)",
    ],
    ids=["saved", "listed before", "in a chain", "changed"],
)
def test_it_has_its_name_however_it_was_imported(installed: dict[str, str], tmp_path: Path, body: str) -> None:
    command = [sys.executable, "-c", DIRECT.format(body=body), str(tmp_path / "method.json")]
    done = subprocess.run(command, env=installed, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "largest_norm\n"), done.stderr


def test_it_has_its_name_in_a_spawned_worker(installed: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "spawning.py"
    script.write_text(
        "import multiprocessing\n"
        "def name(reducer):\n"
        "    return reducer.to_dict()['method']\n"
        "if __name__ == '__main__':\n"
        "    from foveate_largest_norm import LargestNorm\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.apply(name, (LargestNorm(keep=3),)))\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, str(script)], env=installed, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "largest_norm\n"), done.stderr
