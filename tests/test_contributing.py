"""The examples of CONTRIBUTING.md, copied to the letter, are methods as good as ours."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import foveate
import foveate.registry
from tiny import collate, deep_model, model, sample

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = [
    textwrap.dedent(found).lstrip("\n")
    for found in re.findall(r"^ *```python\n(.*?)^ *```$", PAGE, re.MULTILINE | re.DOTALL)
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contributed")
    paths = [folder / f"contributed_{i}.py" for i in range(len(EXAMPLES))]
    for path, text in zip(paths, EXAMPLES, strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


@pytest.fixture
def registered(files, monkeypatch):
    foveate.list_methods()
    monkeypatch.setattr(foveate.registry, "_registry", dict(foveate.registry._registry))
    for path in files:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, module)
        spec.loader.exec_module(module)


def run(*command):
    done = subprocess.run([sys.executable, "-m", *map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_two():
    assert len(EXAMPLES) == 2


def test_lint(files):
    config = ROOT / "pyproject.toml"
    run("ruff", "check", "--config", config, *files)
    run("ruff", "format", "--check", "--config", config, *files)


@pytest.mark.slow
def test_types(files):
    run("mypy", "--strict", "--follow-imports=silent", "--ignore-missing-imports", *files)


@pytest.mark.usefixtures("registered")
def test_before_the_llm_it_is_fastervlm():
    inputs = collate([sample(4, "image", 5, seed=1), sample(2, "image", 6, seed=2)])
    kept = [foveate.reduce(model("llava"), inputs, name, keep=9) for name in ("most_attended", "fastervlm")]
    assert [s.kept.tolist() for s in kept[0].selection] == [s.kept.tolist() for s in kept[1].selection]


@pytest.mark.usefixtures("registered")
def test_inside_the_llm_it_is_fastv():
    net, inputs = deep_model("llava"), collate([sample(4, "image", 5, seed=1), sample(2, "image", 6, seed=2)])
    kept = []
    for name in ("attended_by_the_last", "fastv"):
        with foveate.attach(net, name, keep=9, layer=1) as handle:
            net(**inputs)
        kept.append([span.kept.tolist() for row in handle.selections for span in row])
    assert kept[0] == kept[1]


@pytest.mark.slow
def test_the_battery_runs_on_them(files, tmp_path):
    """In a copy of the repository, with the import and the rows that the page asks for."""
    for part in ("src", "tests", "results"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tmp_path)
    for path in files:
        shutil.copy(path, tmp_path / "src/foveate/methods")
        with (tmp_path / "src/foveate/methods/__init__.py").open("a", encoding="utf-8") as listed:
            listed.write(f"import foveate.methods.{path.stem}\n")
    rows = 'METHODS.append(("most_attended", {}))\nIN_LLM.append(("attended_by_the_last", {"keep": 9, "layer": 1}))\n'
    with (tmp_path / "tests/tiny.py").open("a", encoding="utf-8") as table:
        table.write(rows)
    names = "most_attended or attended_by_the_last"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "slow or not slow",
        "-k",
        names,
        "tests/methods",
        "tests/engines",
    ]
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 100
