"""The command line starts quickly, and helps those who mistype."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import foveate as library
from foveate.cli.names import method_names

HEAVY = ("torch", "transformers", "matplotlib", "gradio", "numpy", "PIL")
SECONDS = 1.0
"""Limit on the CPU time of an answer that needs no model; 0.3 are usual, importing torch alone takes 1.4."""


def spawn(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def python_m(*arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run ``python -m foveate``; returns also its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = spawn("-m", "foveate", *arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        (("--help",), 0, "Keep only the visual tokens that matter"),
        (("--version",), 0, f"foveate {library.__version__}\n"),
        (("run", "--help"), 0, "unpruned and pruned"),
        (("check", "--help"), 0, "right and fast"),
        (("nano", "train", "--help"), 0, "Train the model from nothing"),
        (("rnu",), 2, "Did you mean 'run'?"),
        (("bench", "modl"), 2, "Did you mean 'model'?"),
        (("run", "--compar"), 2, "--compare"),
        (
            ("run", "x.png", "what?", "--method", "vispuner"),
            2,
            "no method is called 'vispuner'; there are: ",
        ),
        (("cost", "--model", "llava-1.5-7b", "--method", "vispuner"), 2, "did you mean 'vispruner'?"),
        (("bench", "model", "--method", "vispuner"), 2, "did you mean 'vispruner'?"),
        (("bench", "selection", "vispuner"), 2, "did you mean 'vispruner'?"),
        (("eval", "--methods", "random, vispuner"), 2, "did you mean 'vispruner'?"),
        (("tune", "x.jsonl", "--speedup", "2", "--methods", "vispuner"), 2, "did you mean 'vispruner'?"),
        (("view", "x.png", "what?", "--method", "vispuner"), 2, "did you mean 'vispruner'?"),
        (("methods", "vispuner"), 2, "vtc_cls; did you mean 'vispruner'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_it_answers_at_once(arguments: tuple[str, ...], code: int, shown: str) -> None:
    done, seconds = python_m(*arguments)
    assert done.returncode == code, done.stderr
    assert shown in (done.stderr if code else done.stdout)
    assert seconds < SECONDS


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = (
        "import json, sys, foveate, foveate.cli, typer.main; typer.main.get_command(foveate.cli.app); dir(foveate); "
        f"print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    )
    done = spawn("-c", code)
    assert json.loads(done.stdout) == [], done.stderr


def test_public_names_are_found_when_asked_for() -> None:
    done = spawn("-c", "import foveate; print(*(getattr(foveate, n).__name__ for n in foveate.__all__), sep='\\n')")
    assert done.stdout.split() == library.__all__, done.stderr
    assert {*library.__all__, "__version__"} <= {*dir(library)}
    with pytest.raises(AttributeError, match="module 'foveate' has no attribute 'vispruner'"):
        _ = library.vispruner


def test_names_of_methods_are_known_without_them() -> None:
    assert method_names() == library.list_methods()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    shown = spawn("-m", "foveate", "--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert shown.returncode == 0, shown.stderr
    assert "_FOVEATE_COMPLETE" in shown.stdout


def test_completion_names_commands_and_options() -> None:
    def complete(words: str) -> list[str]:
        count = str(len(words.split()) - 1)
        return spawn(
            "-m", "foveate", _FOVEATE_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=count
        ).stdout.split()

    assert complete("foveate sc") == ["scenes"]
    assert complete("foveate run --comp") == ["--compare"]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (("families", "llava_nxt"), "generic; did you mean 'llava_next'?"),
        (("cost", "--model", "llava-1.5-7"), "a folder with config.json; did you mean 'llava-1.5-7b'?"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_did_you_mean(foveate: Any, arguments: tuple[str, ...], shown: str) -> None:
    result = foveate(*arguments)
    assert (result.code, result.out) == (2, "")
    assert shown in result.err


def test_families_by_pattern(foveate: Any) -> None:
    assert [row["name"] for row in foveate("families", "llava_next*", "--json").json] == [
        "llava_next",
        "llava_next_video",
    ]


def test_what_only_the_repository_has_is_refused_without_it(
    foveate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foveate.cli.repository._ROOT", tmp_path)
    (tmp_path / "some.md").touch()
    for arguments in (("train",), ("eval",), ("inside",), ("report", "a", "b"), ("card", "a", "--page", "some.md")):
        result = foveate("nano", *arguments)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith("error: what trains, judges and reports on nano is in foveate's repository")
        assert result.err.count("\n") == 1


@pytest.mark.parametrize("name", ["methods.SCOPE", "families.list_families", "nano.load", "author.register"])
def test_rooms_are_attributes_of_the_package(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import foveate; foveate.{name}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([sys.executable, "-c", "import foveate; foveate.nothing"], capture_output=True, text=True)
    assert "module 'foveate' has no attribute 'nothing'" in done.stderr
