"""What is checked, the time for it, and what becomes of errors."""

from __future__ import annotations

import pytest
import torch

from foveate.bench.random_models import random_model
from foveate.check.subjects import load_subject, tiny_shape
from foveate.check.verdicts import Minutes, Verdict, judged
from foveate.core.errors import FoveateError, InputError, UnknownNameError
from foveate.cost.shapes import SHAPES, read_shape


def test_attention_that_is_not_installed_is_refused_in_one_line():
    config, _ = read_shape(tiny_shape(SHAPES["llava-1.5-7b"]))
    with pytest.raises(InputError, match="cannot make this model: FlashAttention2"):
        random_model(config, tied=False, attn="flash_attention_2", device="cpu")


@pytest.mark.parametrize("shape", SHAPES)
def test_tiny_shapes_are_of_the_same_kind(shape):
    config, _ = read_shape(tiny_shape(SHAPES[shape]))
    whole, _ = read_shape(SHAPES[shape])
    assert type(config) is type(whole)
    assert config.get_text_config().num_hidden_layers == 4
    assert config.get_text_config().vocab_size == whole.get_text_config().vocab_size


def test_an_unknown_name_lists_the_shapes():
    with pytest.raises(UnknownNameError, match=r"qwen2\.5-vl-7b, .* any of them behind 'tiny-'"):
        load_subject("nothing", "cpu", "auto", None)


def test_minutes_are_shared():
    clock = iter([0.0, 0.0, 30.0, 30.0, 100.0, 1000.0])
    minutes = Minutes(2, lambda: next(clock))
    assert minutes.left == 120
    assert minutes.left == 90
    assert Minutes(2, iter([0.0, 60.0, 60.0, 60.0, 90.0]).__next__).half().left == 0
    assert minutes.spent == 30
    assert minutes.left == 20
    assert minutes.left == 0


@pytest.mark.parametrize(
    ("error", "word", "said"),
    [
        (FoveateError("cannot"), "not run", "cannot"),
        (RuntimeError("broke"), "wrong", "RuntimeError: broke"),
    ],
)
def test_errors_are_verdicts(error, word, said):
    def look():
        raise error

    assert judged("x", look, Minutes(1)) == Verdict("x", word, said)


def test_too_little_memory_is_no_fault():
    def look():
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert judged("x", look, Minutes(1)) == Verdict("x", "not run", "out of memory")
