from __future__ import annotations

import json
from pathlib import Path

import pytest

from foveate.core.errors import InputError
from foveate.tune.prompts import ordered, read_prompts, same_text

GOOD = {"image": "a.png", "question": "what?"}


@pytest.fixture
def write(tmp_path: Path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")

    def to(*lines: object) -> Path:
        path = tmp_path / "prompts.jsonl"
        path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), encoding="utf-8")
        return path

    return to


def test_reads_images_questions_and_answers(write, tmp_path):
    split = "a line\u2028separator"
    lines = [
        {**GOOD, "answer": "yes", "id": 7}, "", {"images": ["a.png", "b.png"], "question": "?", "answer": "no"},
    ]  # fmt: skip
    lines.append(json.dumps({**GOOD, "question": split, "answer": "no"}, ensure_ascii=False) + "\r")
    first, second, third = read_prompts(write(*lines))
    assert (first.line, first.images, first.question, first.answer) == (1, (tmp_path / "a.png",), "what?", "yes")
    assert (second.line, second.images) == (3, (tmp_path / "a.png", tmp_path / "b.png"))
    assert (third.line, third.question) == (4, split)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is no JSON"),
        ("[1]", "is no object"),
        ({"question": "what?"}, 'either "image"'),
        ({**GOOD, "images": ["a.png"]}, 'either "image"'),
        ({"images": [], "question": "what?"}, "names no image files"),
        ({"images": "a.png", "question": "what?"}, "names no image files"),
        ({"image": 3, "question": "what?"}, "names no image files"),
        ({"image": "nowhere.png", "question": "what?"}, "does not exist"),
        ({"image": "a.png"}, 'needs a "question"'),
        ({"image": "a.png", "question": " "}, 'needs a "question"'),
        ({**GOOD, "answer": 3}, "is no text"),
    ],
)
def test_a_bad_line_is_named(write, line, message):
    with pytest.raises(InputError, match=rf"line 2 of .*{message}"):
        read_prompts(write(GOOD, line))


def test_all_lines_have_answers_or_none(write):
    with pytest.raises(InputError, match=r"line 2 .* has an answer and line 1 has none"):
        read_prompts(write(GOOD, {**GOOD, "answer": "yes"}))


def test_files_without_prompts(write, tmp_path):
    with pytest.raises(InputError, match="no prompts in"):
        read_prompts(write("", " "))
    with pytest.raises(InputError, match="cannot read prompts"):
        read_prompts(tmp_path / "nowhere.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"image": "\xe9"}')
    with pytest.raises(InputError, match="cannot read prompts"):
        read_prompts(tmp_path / "latin.jsonl")


def test_every_image_comes_once_before_one_comes_again(write):
    lines = [{"image": name, "question": str(i)} for name in ("a.png", "b.png") for i in range(4)]
    prompts = read_prompts(write(*lines))
    order = ordered(prompts, 0)
    assert sorted(p.line for p in order) == list(range(1, 9))
    for pair in zip(order[::2], order[1::2], strict=True):
        assert len({p.images for p in pair}) == 2
    assert order == ordered(prompts, 0) != ordered(prompts, 1)


@pytest.mark.parametrize(
    ("one", "other", "same"), [("Yes.", "yes", True), (" a  cat", "A cat", True), ("1", "2", False)]
)
def test_right_answers(one, other, same):
    assert same_text(one, other) is same
