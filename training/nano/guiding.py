"""SGL and DyVTE on nano: a model that guides itself and a deeper copy, and exits that gates or rules decide."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from foveate.core.errors import InputError
from foveate.core.reducer import Method
from foveate.engines.transformers.attach import attach
from foveate.families import family_of
from foveate.fit.gates import train_gates
from foveate.guided.guide import BestScored, guide
from foveate.guided.prompts import with_answer
from foveate.measure.pages import markdown_table
from foveate.measure.provenance import versions
from foveate.methods import SGL, DyVTE, Random, VisPruner, VisualExit
from foveate.nano import load
from foveate.nano.evaluate import Tally, difference
from foveate.nano.questions import QUESTION_KINDS, Question
from foveate.nano.runner import PROMPT
from foveate.nano.scenes import Scene, scenes

EVERY = 3
"""One question of so many of a scene is asked, as all of them together take long."""
BUDGETS = (32, 8)
THRESHOLDS = (0.5, 0.7, 0.9, 0.95, 0.99)
_EARLY = ("left_early", "right_of_these", "right_of_the_others")
Answers = Callable[[Scene, dict[str, Any]], list[int]]


def deepened(model: Any, seed: int = 0, scale: float = 0.05) -> Any:
    """Return a copy with a random layer behind each decoder layer, which adds little to the residual stream.

    Parameters
    ----------
    scale
        Factor on the weights with which the random layers write into the stream.
    """
    config = copy.deepcopy(model.config)
    config.text_config.num_hidden_layers *= 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        deep = LlavaForConditionalGeneration(config)
    layers = deep.get_decoder().layers
    with torch.no_grad():
        for layer in layers[1::2]:
            layer.self_attn.o_proj.weight.mul_(scale)
            layer.mlp.down_proj.weight.mul_(scale)
    weights = {}
    for name, weight in model.state_dict().items():
        before, found, behind = name.partition("language_model.layers.")
        if found:
            number, _, rest = behind.partition(".")
            name = f"{before}{found}{2 * int(number)}.{rest}"
        weights[name] = weight
    deep.load_state_dict(weights, strict=False)
    deep.tie_weights()
    deep.generation_config = model.generation_config
    return deep.eval()


def measure(
    images: int, seed: int, training_images: int, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Measure everything on test scenes, with gates trained on training scenes.

    Returns
    -------
    dict
        Accuracy by condition; the answers that leave early by threshold; where gates and rules let tokens leave.
    """
    model, processor = load()
    tested = [scene for scene in scenes(seed, images, "test") if scene.questions[::EVERY]]
    if not tested:
        raise InputError(f"the first {images} test scenes of seed {seed} ask nothing: take more")
    say("all tokens")
    whole = _score(processor, tested, lambda scene, inputs: _words(model.generate(**inputs, max_new_tokens=2)))
    result: dict[str, Any] = {
        "images": images, "seed": seed, "questions": int(whole.asked.sum()), "training_images": training_images,
        "versions": versions(), "accuracy": {"all tokens": whole.share()},
    }  # fmt: skip
    deep = deepened(model)
    deep_whole = _score(processor, tested, lambda scene, inputs: _words(deep.generate(**inputs, max_new_tokens=2)))
    result["accuracy"]["deeper copy, all tokens"] = deep_whole.share()
    for keep in BUDGETS:
        say(f"{keep} tokens")
        tallies = {
            name: _score(processor, tested, run)
            for name, run in {
                "sgl, nano guides itself": _guided(model, model, SGL(keep=keep, layer=1)),
                "sgl, nano guides the deeper copy": _guided(deep, model, SGL(keep=keep, layer=2)),
                "random scores": _random(model, SGL(keep=keep, layer=1)),
                "sgl's scores before the LLM": _before(model, keep),
                "vispruner before the LLM": _attached(model, VisPruner(keep=keep)),
                "random before the LLM": _attached(model, Random(keep=keep)),
            }.items()
        }
        result["accuracy"] |= {f"{name}, {keep}": tally.share() for name, tally in tallies.items()}
        before = tallies["sgl's scores before the LLM"]
        result.setdefault("sgl_scores_above", {})[str(keep)] = {
            other: difference(before, tallies[f"{other} before the LLM"]) for other in ("vispruner", "random")
        }
    say("early exit")
    result["early_exit"] = _early_exit(model, processor, tested)
    say("training gates")
    result["exits"] = _exits(model, processor, tested, scenes(seed, training_images, "train"), say)
    return result


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Return what `measure` found as tables in Markdown, by the names of their places in a page."""
    accuracy, exits, early = result["accuracy"], result["exits"], result["early_exit"]
    names = list(dict.fromkeys(name.rpartition(", ")[0] for name in accuracy if name.rpartition(", ")[2].isdigit()))
    rows = [[name, *(_percent(accuracy[f"{name}, {keep}"]) for keep in BUDGETS)] for name in names]
    whole = [[name, *[_percent(accuracy[name])] * len(BUDGETS)] for name in ("all tokens", "deeper copy, all tokens")]
    return {
        "sgl": markdown_table(["", *(f"{keep} of 256 tokens" for keep in BUDGETS)], [*whole, *rows]),
        "early-exit": markdown_table(
            ["`exit_at`", "answered by the small model", "right of these", "right of the others"],
            [[name, *("-" if row[k] is None else f"{row[k]:.1f} %" for k in _EARLY)] for name, row in early.items()],
        ),
        "exits": markdown_table(
            ["tokens leave by", "accuracy", "layers with the image, mean share"],
            [[name, _percent(row), f"{row['mean_share']:.2f}"] for name, row in exits.items()],
        ),
        "inside-about": (
            f"{result['questions']} questions about {result['images']} test scenes (seed {result['seed']}), gates from "
            f"{result['training_images']} training scenes; percent, with standard errors clustered by image."
        ),
    }  # fmt: skip


def _percent(share: dict[str, float]) -> str:
    return f"{share['accuracy']:.1f} ± {share['error']:.1f}"


def _inputs(processor: Any, scene: Scene, questions: Sequence[Question]) -> dict[str, Any]:
    texts = [f"{PROMPT} {q.text}" for q in questions]
    return dict(processor(images=[scene.image] * len(texts), text=texts, return_tensors="pt", padding=True))


def _words(sequences: Tensor) -> list[int]:
    """Return the first word of each answer of two tokens, the word and the end."""
    return [int(word) for word in sequences[:, -2]]


def _score(processor: Any, tested: Iterable[Scene], answer: Answers) -> Tally:
    right, asked = [], []
    for scene in tested:
        questions = scene.questions[::EVERY]
        words = processor.tokenizer.convert_ids_to_tokens(answer(scene, _inputs(processor, scene, questions)))
        counts = np.zeros((2, len(QUESTION_KINDS)), np.int64)
        for question, word in zip(questions, words, strict=True):
            counts[:, QUESTION_KINDS.index(question.kind)] += (question.answer == word, 1)
        right.append(counts[0])
        asked.append(counts[1])
    return Tally(np.stack(right), np.stack(asked))


def _guided(large: Any, small: Any, method: SGL) -> Answers:
    guided = guide(large, small, method)
    return lambda scene, inputs: _words(guided.generate(**inputs, max_new_tokens=2))


def _attached(model: Any, method: Method) -> Answers:
    def answer(scene: Scene, inputs: dict[str, Any]) -> list[int]:
        with attach(model, method, positions="original"):
            return _words(model.generate(**inputs, max_new_tokens=2))

    return answer


def _before(model: Any, keep: int) -> Answers:
    """Let the scores choose what enters the LLM, which tells how good they are: nano looks at images in layer 0."""
    guided = guide(model, model, SGL(layer=1))

    def answer(scene: Scene, inputs: dict[str, Any]) -> list[int]:
        scores = guided.scores(**inputs, max_new_tokens=2)
        return _attached(model, BestScored(keep / len(scores[0]), tuple(scores)))(scene, inputs)

    return answer


def _random(model: Any, method: SGL) -> Answers:
    def answer(scene: Scene, inputs: dict[str, Any]) -> list[int]:
        generator = torch.Generator().manual_seed(scene.index)
        size = int((inputs["input_ids"][0] == model.config.image_token_id).sum())
        scores = [torch.rand(size, generator=generator) for _ in inputs["input_ids"]]
        with attach(model, method) as handle, handle.scored(scores):
            return _words(model.generate(**inputs, max_new_tokens=2))

    return answer


def _early_exit(model: Any, processor: Any, tested: Iterable[Scene]) -> dict[str, Any]:
    """Return how many answers leave early at some thresholds, and how many of these and of the others are right."""
    found: list[tuple[float, bool]] = []
    guided = guide(model, model, SGL(layer=1), exit_at=0.0)
    for scene in tested:
        questions = scene.questions[::EVERY]
        words = _words(guided.generate(**_inputs(processor, scene, questions), max_new_tokens=2))
        for question, word, outcome in zip(
            questions, processor.tokenizer.convert_ids_to_tokens(words), guided.outcomes, strict=True
        ):
            found.append((outcome.score or 0.0, question.answer == word))
    rows = {}
    for threshold in THRESHOLDS:
        early, late = ([right for score, right in found if (score >= threshold) == is_early] for is_early in (1, 0))
        rows[str(threshold)] = {
            "left_early": round(100 * len(early) / len(found), 1),
            "right_of_these": round(100 * float(np.mean(early)), 1) if early else None,
            "right_of_the_others": round(100 * float(np.mean(late)), 1) if late else None,
        }
    return rows


def _batches(model: Any, processor: Any, drawn: Iterable[Scene]) -> Iterator[dict[str, Any]]:
    family, end = family_of(model), processor.tokenizer.eos_token_id
    for scene in drawn:
        if questions := scene.questions[::EVERY]:
            inputs = _inputs(processor, scene, questions)
            words = processor.tokenizer.convert_tokens_to_ids([q.answer for q in questions])
            answers = torch.tensor([[word, end] for word in words])
            labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answers], dim=1)
            yield {**with_answer(family, inputs, answers), "labels": labels}


def _exits(
    model: Any, processor: Any, tested: Sequence[Scene], drawn: Iterable[Scene], say: Callable[[str], None]
) -> dict[str, Any]:
    gates = train_gates(
        model, _batches(model, processor, drawn), exits=None, hidden=256, epochs=40, batch=64, learning_rate=1e-3
    )
    depth, rows = model.get_decoder().config.num_hidden_layers, {}
    with tempfile.TemporaryDirectory() as folder:
        gates.save(path := Path(folder) / "gates.safetensors")
        methods: dict[str, Method | None] = {
            "none": None,
            "dyvte": DyVTE(gates=str(path)),
            "dyvte, bias 2": DyVTE(gates=str(path), bias=2.0),
            **{f"fixed, behind {n} of {depth}": VisualExit(keep=n / depth) for n in range(1, depth)},
            "mass, below 0.1": VisualExit(keep=1 / depth, rule="mass"),
            "converged, above 0.9": VisualExit(keep=1 / depth, rule="converged", threshold=0.9),
        }
        for name, method in methods.items():
            say(name)
            seen: list[int] = []

            def answer(scene: Scene, inputs: dict[str, Any], method: Any = method, seen: list[int] = seen) -> list[int]:
                with attach(model, method, positions="original") if method else nullcontext() as handle:
                    words = _words(model.generate(**inputs, max_new_tokens=2))
                for i in range(len(words)):
                    left = [b for b, kept in (handle.layers if handle else {}).items() if not len(kept[i][0])]
                    seen.append(min(left, default=depth))
                return words

            accuracy = _score(processor, tested, answer).share()
            counts = {str(n): seen.count(n) for n in sorted(set(seen))}
            rows[name] = {**accuracy, "mean_share": round(float(np.mean(seen)) / depth, 3), "layers_with_image": counts}
    return rows
