"""What a stranger sees of the repository: the page on PyPI, the types of the installed package, how to cite it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import yaml

import foveate

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCES = ("https://github.com/foveate/foveate/blob/main/", "https://raw.githubusercontent.com/foveate/foveate/main/")
SITE = "https://foveate.github.io/foveate/"
FORMS = sorted(p for p in ROOT.glob(".github/ISSUE_TEMPLATE/*.yml") if p.name != "config.yml")

SCRIPT = """\
from typing import Any

import foveate
from foveate import VisPruner


def ask(model: Any, inputs: dict[str, Any]) -> list[str]:
    with foveate.attach(model, VisPruner(keep=64)) as handle:
        model.generate(**inputs)
    kept: list[int] = [len(span) for row in handle.selections for span in row]
    smaller = foveate.reduce(model, inputs, VisPruner(keep=kept[0]))
    model.generate(**smaller)
    wrong: int = foveate.list_methods("*prune*")
    return foveate.list_methods("*prune*")
"""


def links() -> list[str]:
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    return re.findall(r"\]\(([^)]+)\)", prose)


def test_the_readme_has_no_relative_link():
    assert links()
    assert [link for link in links() if not link.startswith("https://")] == []


def test_links_of_the_readme_into_the_repository_name_files():
    files = [link.removeprefix(source) for link in links() for source in SOURCES if link.startswith(source)]
    pages = [f"docs/{link.removeprefix(SITE).strip('/')}.md" for link in links() if link.startswith(SITE)]
    assert files
    assert pages
    assert [name for name in files + pages if not (ROOT / name).is_file()] == []


def test_the_package_declares_its_types():
    assert resources.files("foveate").joinpath("py.typed").is_file()


@pytest.mark.slow
def test_a_users_script_sees_real_types(tmp_path):
    """mypy finds the package where the interpreter imports it from, and nothing of this repository's configuration."""
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    path = {"PYTHONPATH": str(Path(foveate.__file__).parents[1])}
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "script.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **path}, capture_output=True, text=True, check=False
    )
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1, done.stdout + done.stderr
    line = 1 + SCRIPT.splitlines().index('    wrong: int = foveate.list_methods("*prune*")')
    assert errors[0].startswith(f"script.py:{line}: error: Incompatible types in assignment")


def test_the_citation_is_complete_and_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == foveate.__version__
    assert citation["message"]
    assert citation["title"].startswith("foveate")
    assert all(author["name"] for author in citation["authors"])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_issue_forms_are_complete(form):
    content = yaml.safe_load(form.read_text(encoding="utf-8"))
    assert content["name"]
    assert content["description"]
    names = [field["id"] for field in content["body"]]
    assert len(names) == len(set(names))
    assert all(field["attributes"]["label"] for field in content["body"])
