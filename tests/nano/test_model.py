"""The shipped model: stock loading, prompts, size, and accuracy on fresh validation scenes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

import foveate
from foveate import VisPruner, nano
from foveate.methods.cdpruner import CDPruner
from foveate.methods.random import Random
from foveate.nano.evaluate import Tally, difference, evaluate, question_prior
from foveate.nano.runner import Condition, Runner


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return nano.load()


def answer(loaded: tuple[Any, Any], image: Any, text: str, **changes: Any) -> str:
    model, processor = loaded
    inputs = processor(images=image, text=text, return_tensors="pt", **changes)
    tokens = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    return str(processor.decode(tokens, skip_special_tokens=True)).strip()


def test_loads_as_a_stock_model() -> None:
    model = LlavaForConditionalGeneration.from_pretrained(nano.WEIGHTS)
    processor = AutoProcessor.from_pretrained(nano.WEIGHTS)
    assert type(model) is LlavaForConditionalGeneration
    assert type(processor).__module__.startswith("transformers.")
    assert model.config.vision_feature_layer == -2
    assert model.lm_head.weight.dtype == torch.float16


def test_is_small() -> None:
    assert sum(file.stat().st_size for file in nano.WEIGHTS.iterdir()) <= 20e6


def test_generate_stops_after_one_word(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    shown = nano.scene("validation", 8, 1)
    inputs = processor(images=shown.image, text=f"<image> {shown.questions[0].text}", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    assert len(out) == 2
    assert out[1] == processor.tokenizer.eos_token_id


def test_prompt_forms_are_one_prompt(loaded: tuple[Any, Any]) -> None:
    _, processor = loaded
    image = nano.scene("validation", 8, 0).image
    forms = [
        "<image> what color is the star?",
        "<image>\nWhat Colour is the STAR",
        "<image>what color is the star ?",
        "USER: <image>\nwhat color is the star?\nAnswer the question using a single word or phrase. ASSISTANT:",
    ]
    ids = [processor(images=image, text=form, return_tensors="pt")["input_ids"].tolist() for form in forms]
    assert all(one == ids[0] for one in ids)
    words = processor.tokenizer.convert_ids_to_tokens(ids[0][0])
    assert words == ["<s>", *["<image>"] * 256, "what", "color", "is", "the", "star"]


def test_chat_template_gives_the_same_ids(loaded: tuple[Any, Any]) -> None:
    _, processor = loaded
    image = nano.scene("validation", 8, 0).image
    content = [{"type": "image", "image": image}, {"type": "text", "text": "is there a star?"}]
    chat = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    plain = processor(images=image, text="<image> is there a star?", return_tensors="pt")
    assert torch.equal(chat["input_ids"], plain["input_ids"])
    talk = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
    assert processor.apply_chat_template(talk).rstrip().endswith("yes </s>")


def test_unknown_words_become_unk(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1].tokenizer
    assert tokenizer.tokenize("is there a zeppelin?")[-1] == "<unk>"


def test_answers_validation_scenes(loaded: tuple[Any, Any]) -> None:
    conditions = [Condition("full"), Condition("wrong", wrong_image=True), Condition("random", Random(keep=16))]
    found = evaluate(*loaded, nano.scenes(17, 60, "validation"), conditions)
    assert found["full"].share()["accuracy"] > 85
    assert found["wrong"].share()["accuracy"] < 42
    assert difference(found["full"], found["random"])["points"] > 15


@pytest.mark.parametrize("condition", [
    Condition("full"),
    pytest.param(Condition("original", VisPruner(keep=32), "original"), marks=pytest.mark.slow),
    pytest.param(Condition("compact", VisPruner(keep=32), "compact"), marks=pytest.mark.slow),
    Condition("question", CDPruner(keep=32), "compact"),
])  # fmt: skip
def test_shared_prefix_answers_as_generate_does(loaded: tuple[Any, Any], condition: Condition) -> None:
    model, processor = loaded
    runner = Runner(model, processor)
    for shown in nano.scenes(18, 3, "validation"):
        with torch.inference_mode():
            inputs, tokens = runner.look(shown.image, [condition.reducer or VisPruner(keep=32)])
            shared, kept = runner.ask(inputs, tokens, condition, shown.questions)
        assert kept == (256 if condition.reducer is None else 32)
        for question, found in zip(shown.questions, shared, strict=True):
            inputs = dict(processor(images=shown.image, text=f"<image> {question.text}", return_tensors="pt"))
            if condition.reducer is not None:
                inputs = foveate.reduce(model, inputs, condition.reducer, positions=condition.positions)
            length = inputs["input_ids"].shape[1]
            assert processor.decode(model.generate(**inputs, max_new_tokens=1)[0, length:]) == found


def test_attached_methods_answer_whole_prompts_alike(loaded: tuple[Any, Any]) -> None:
    runner, condition = Runner(*loaded), Condition("compact", VisPruner(keep=32), "compact")
    for shown in nano.scenes(18, 2, "validation"):
        with torch.inference_mode():
            inputs, tokens = runner.look(shown.image, [VisPruner(keep=32)])
            shared, _ = runner.ask(inputs, tokens, condition, shown.questions)
            assert runner.ask_attached(runner.prompts(inputs, shown.questions), condition)[0] == shared


def test_sample_is_answered_whole_and_pruned(loaded: tuple[Any, Any]) -> None:
    image, question, right = nano.sample()
    assert answer(loaded, image, f"<image> {question}") == right
    with foveate.attach(loaded[0], VisPruner(keep=32)):
        assert answer(loaded, image, f"<image> {question}") == right


def test_question_prior_is_blind() -> None:
    assert question_prior(nano.scenes(2, 30, "validation"), count=1000).share()["accuracy"] < 40


def test_error_is_clustered_by_image() -> None:
    import numpy as np

    kinds = np.zeros((4, 8), np.int64)
    right, asked = kinds.copy(), kinds.copy()
    asked[:, 0], right[:2, 0] = 10, 10
    share = Tally(right, asked).share()
    assert share["accuracy"] == 50.0
    assert share["error"] == pytest.approx(28.87, abs=0.01)
