"""The sample image of the demo: a validation scene that nano answers rightly with all tokens and with few."""

from __future__ import annotations

import json
from typing import Any

import foveate
from foveate.core.errors import FoveateError
from foveate.methods.vispruner import VisPruner
from foveate.nano import SAMPLE, scenes
from foveate.nano.scenes import Scene

SEED = 7
KEEP = 32
FEWEST_OBJECTS = 7


def _right(model: Any, processor: Any, shown: Scene, text: str, answer: str) -> bool:
    inputs = processor(images=shown.image, text=f"<image> {text}", return_tensors="pt")
    for given in (inputs, foveate.reduce(model, inputs, VisPruner(keep=KEEP))):
        words = model.generate(**given)[0, given["input_ids"].shape[1] :]
        if processor.decode(words, skip_special_tokens=True).strip() != answer:
            return False
    return True


def write_sample(model: Any, processor: Any) -> None:
    """Write ``sample.png`` and, beside it, ``sample.json`` with its question and answer.

    The first busy validation scene is taken whose colour question comes out right whole and pruned.

    Parameters
    ----------
    model, processor
        From ``foveate.nano.load()``.

    Raises
    ------
    FoveateError
        If there is none among 100 scenes.
    """
    for shown in scenes(SEED, 100, "validation"):
        if len(shown.objects) < FEWEST_OBJECTS:
            continue
        for question in shown.questions:
            asks_object = question.kind == "color" and "background" not in question.text
            if asks_object and _right(model, processor, shown, question.text, question.answer):
                shown.image.save(SAMPLE, optimize=True)
                about = {"split": shown.split, "seed": shown.seed, "index": shown.index}
                about |= {"question": question.text, "answer": question.answer}
                SAMPLE.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")
                return
    raise FoveateError(f"no sample among 100 validation scenes of seed {SEED} is answered rightly; train longer")
