"""Training: exact resumption, and the lean forward pass against the stock model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from foveate.core.errors import FoveateError
from foveate.nano import scene
from foveate.nano.questions import Question
from training.nano.architecture import initial_weights
from training.nano.export import build_model, build_processor
from training.nano.lean import TEXT, decode, project, tower
from training.nano.recipe import Recipe
from training.nano.texts import BOS_ID, attention_mask, pack, positions
from training.nano.train import train
from training.nano.worker import Worker


@pytest.fixture(scope="module")
def tiny() -> Recipe:
    full = Recipe.load()
    return replace(
        full,
        images=12,
        decoder_images=12,
        validation_images=8,
        vision_layers=2,
        vision_mlp=64,
        text_layers=1,
        text_mlp=64,
        tower=replace(full.tower, steps=4, batch=4, warmup=1),
        decoder=replace(full.decoder, steps=4, batch=4, warmup=1),
        evaluate_every=4,
        save_every=2,
    )


@pytest.fixture(scope="module")
def trained(tiny: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    train(tiny, out, processes=1)
    return out


@pytest.mark.parametrize("stop", [("tower", 2), ("decoder", 2), ("decoder", 3)])
def test_resuming_changes_nothing(tiny: Recipe, trained: Path, tmp_path: Path, stop: tuple[str, int]) -> None:
    tiny.save(tmp_path / "recipe.json")
    Worker(tiny, tmp_path).run(stop)
    assert not (tmp_path / "final.safetensors").exists()
    train(tiny, tmp_path, resume=True, processes=1)
    whole, parts = load_file(trained / "final.safetensors"), load_file(tmp_path / "final.safetensors")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_is_not_overwritten(tiny: Recipe, trained: Path) -> None:
    with pytest.raises(FoveateError, match="resume"):
        train(tiny, trained, processes=1)
    with pytest.raises(FoveateError, match="differs"):
        train(replace(tiny, seed=7), trained, resume=True, processes=1)


@pytest.mark.slow
def test_two_processes_write_a_model_folder(tiny: Recipe, tmp_path: Path) -> None:
    folder = train(tiny, tmp_path, processes=2)
    assert (folder / "model.safetensors").exists()


def test_recipe_survives_its_file(tmp_path: Path) -> None:
    recipe = Recipe.load()
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe


@pytest.mark.parametrize("text", ["what color is the red star?", "is the cup left of the blue sign?"])
def test_lean_forward_equals_the_stock_model(text: str) -> None:
    recipe = Recipe.load()
    weights = {name: value for name, value in initial_weights(recipe).items() if not name.startswith("heads.")}
    model, processor = build_model(recipe, weights), build_processor()
    shown = scene("train", 0, 1)
    inputs = processor(images=shown.image, text=f"<image> {text}", return_tensors="pt")
    with torch.no_grad():
        stock = model(**inputs).logits[0, -1]
        features, _, _ = tower(weights, recipe, torch.from_numpy(np.array(shown.image))[None])
        texts = pack([[Question(text, "red", "color")]])
        words = weights[TEXT + "embed_tokens.weight"]
        x = torch.cat([words[BOS_ID].expand(1, 1, -1), project(weights, features), words[texts.ids]], 1)
        places = positions(texts, torch.ones(1))
        hidden = decode(weights, recipe, x, places, attention_mask(texts), texts.ids.shape[1])
    assert torch.allclose(stock, hidden[0, texts.columns[0]] @ words.T, atol=1e-4)


def test_questions_do_not_see_each_other() -> None:
    one, two = Question("is there a star?", "no", "exist"), Question("where is the cup?", "top", "where")
    recipe = Recipe.load()
    weights = initial_weights(recipe)
    words = weights[TEXT + "embed_tokens.weight"]
    image = torch.randn(1, 256, recipe.hidden_size, generator=torch.Generator().manual_seed(0))

    def last(questions: list[Question]) -> torch.Tensor:
        texts = pack([questions])
        x = torch.cat([words[BOS_ID].expand(1, 1, -1), image, words[texts.ids]], 1)
        places = positions(texts, torch.ones(1))
        hidden = decode(weights, recipe, x, places, attention_mask(texts), texts.ids.shape[1])
        return hidden[texts.rows[-1], texts.columns[-1]]

    assert torch.allclose(last([two]), last([one, two]), atol=1e-5)


def test_compressed_positions_keep_every_token() -> None:
    texts = pack([[Question("is there a star?", "no", "exist")]])
    places = positions(texts, torch.tensor([8.0]))
    assert places.shape == (1, 257 + 5)
    assert places[0, :257].diff().min() >= 0
    assert places[0, 257] == places[0, 256] + 1
