"""Families of other packages: one that is installed as users do, and what is wrong with those that are left out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import foveate
from foveate import FoveateError
from foveate.families import Family, all_families, family_of_class, list_families, register_family, registry
from foveate.families.llava import Llava
from foveate.families.qwen2_vl import Qwen2Vl

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "family_plugin"
SCRIPT = """
import torch
from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration, LlamaConfig, SiglipVisionConfig

import foveate
from foveate.cost import anatomy_of, work_of
from foveate.families import family_of

torch.manual_seed(0)
small = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4)
model = DeepseekVLForConditionalGeneration(DeepseekVLConfig(
    vision_config=SiglipVisionConfig(**small, num_hidden_layers=3, image_size=32, patch_size=8),
    text_config=LlamaConfig(**small, num_hidden_layers=2, num_key_value_heads=4, vocab_size=64), image_token_id=60,
)).eval()
family = family_of(model)
assert family.name == "deepseek_vl", family
assert foveate.list_families()[-2:] == ["deepseek_vl", "generic"]
ids = torch.tensor([[1, 2, *[60] * 16, 5, 6, 7]])
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.rand(1, 3, 32, 32)}
with torch.no_grad():
    whole = model(**inputs).logits
    reduced = foveate.reduce(model, inputs, "vispruner", keep=6, positions="original")
    assert reduced["input_ids"].shape[1] == 11
    few = model(**reduced).logits
    kept = reduced.selection[0].kept + 2
    columns = torch.tensor([0, 1, *kept.tolist(), 18, 19, 20])
    visible = torch.full((1, 1, 21, 21), float("-inf")).triu(1)
    visible[..., [c for c in range(21) if c not in columns]] = float("-inf")
    visible.diagonal(dim1=-2, dim2=-1).zero_()
    embeds = model.get_input_embeddings()(ids).masked_scatter(
        (ids == 60)[..., None], model.model.get_image_features(inputs["pixel_values"]).pooler_output
    )
    masked = model(inputs_embeds=embeds, attention_mask=visible, position_ids=torch.arange(21)[None]).logits
    torch.testing.assert_close(few, masked[:, columns], atol=1e-5, rtol=1e-4)
    with foveate.attach(model, "vispruner", keep=16):
        assert torch.equal(model(**inputs).logits, whole)
    assert foveate.reduce(model, inputs, "downsample", keep=4)["input_ids"].shape[1] == 9
anatomy = anatomy_of(model.config)
work = work_of(anatomy, inputs, family.spans(model, inputs))
assert (work.pictures, work.tokens, anatomy.projector) == (((4, 4),), 16, 2 * 2 * 32 * 32)

from foveate.cli import app

app(["families", "--json"])
"""


def test_it_is_a_family_like_any_other(tmp_path: Path) -> None:
    source = shutil.copytree(EXAMPLE, tmp_path / "source")  # building leaves files beside the sources
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet",
               "--disable-pip-version-check", "--target", str(tmp_path / "site"), str(source)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)
    library = str(Path(foveate.__file__).resolve().parents[1])
    installed = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), library])}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=installed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["deepseek_vl"]["model_types"] == ["deepseek_vl"]
    assert rows["deepseek_vl"]["inputs"] == {"pixel_values": "image"}
    assert "llava" in rows


def test_it_is_not_there_without_its_package() -> None:
    assert "deepseek_vl" not in list_families()


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let packages of others be found, each by a name and what loading it returns or raises."""
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))

    def install(*found: tuple[str, Any]) -> None:
        def load(what: Any) -> Any:
            if isinstance(what, Exception):
                raise what
            return what

        points = [SimpleNamespace(name=n, value=f"package:{n}", load=lambda what=what: load(what)) for n, what in found]
        monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "foveate.families" else [])
        registry._add_plugins.cache_clear()

    yield install
    registry._add_plugins.cache_clear()
    monkeypatch.undo()


def family(base: type = Qwen2Vl, **declared: Any) -> Any:
    return type("Mine", (base,), {"name": "mine", "model_types": ("mine_vl",), **declared})


def test_a_family_is_found_by_its_entry_point(plugins: Any) -> None:
    mine = family()
    plugins(("mine", mine))
    assert list_families()[-2:] == ["mine", "generic"]
    model_class = type("Model", (), {"generate": None})
    assert type(family_of_class(model_class, SimpleNamespace(model_type="mine_vl"))) is mine


@pytest.mark.parametrize(
    ("name", "what", "told"),
    [
        ("mine", ImportError("no module called tensors"), "no module called tensors"),
        ("mine", family(name="yours"), "the class is called 'yours'"),
        ("mine", "Mine", "not 'Mine'"),
        ("llava", family(name="llava"), "taken by foveate.families.llava.Llava"),
    ],
)
def test_a_broken_or_clashing_one_is_left_out_with_a_warning(plugins: Any, name: str, what: Any, told: str) -> None:
    plugins((name, what), ("good", family(name="good", model_types=("good_vl",))))
    with pytest.warns(UserWarning, match=f"the family '{name}' of 'package:{name}' is left out: .*{told}"):
        known = list_families()
    assert "mine" not in known
    assert "good" in known
    assert type(all_families()["llava"]) is Llava


def own(self: Any, config: Any) -> bool:
    return config.model_type == "llava" and config.mine


@pytest.mark.parametrize(
    ("cls", "told"),
    [
        (dict, r"derived from foveate\.families\.Family, not <class 'dict'>"),
        (family(), None),
        (family(model_types=("llava",), matches=own), None),
        (
            type("Half", (Family,), {"name": "half"}),
            "Half lacks encode, encode_at, encoder_outputs, project, spans: write them",
        ),
        (family(name="Mine"), "lower-case letters, digits and '_': Mine is called 'Mine'"),
        (family(name="my family"), "is called 'my family'"),
        (family(name=None), "is called None"),
        (family(name="pixtral"), r"'pixtral' of Mine is taken by foveate\.families\.pixtral\.Pixtral: choose another"),
        (family(name="generic"), r"'generic' of Mine is taken by foveate\.families\.generic\.Generic"),
        (family(model_types=()), r"model_types of the family 'mine' is a tuple .* such as \('mine',\): not \(\)"),
        (family(model_types="mine_vl"), "not 'mine_vl'"),
        (family(model_types=("mine_vl", "llava")), "'llava' of the family 'mine' is taken by the family 'llava'"),
        (family(Llava, model_types=("llava",)), "taken by the family 'llava': override matches"),
        (family(inputs={}), "inputs of the family 'mine' says which model inputs hold pixels.* not {}"),
        (family(inputs={"pixel_values": "sound"}), r"not {'pixel_values': 'sound'}"),
        (family(inputs=("pixel_values",)), r"not \('pixel_values',\)"),
    ],
)
def test_declarations_are_checked(plugins: Any, cls: Any, told: str | None) -> None:
    plugins()
    if told is None:
        assert register_family(cls) is cls
        assert type(all_families()["mine"]) is cls
        return
    before = dict(registry._registry)
    with pytest.raises(FoveateError, match=told):
        register_family(cls)
    assert registry._registry == before


def test_a_family_that_shares_a_model_type_takes_the_models_that_it_says(plugins: Any) -> None:
    plugins(("mine", family(model_types=("llava",), matches=own)))
    vision = SimpleNamespace(model_type="clip_vision_model")
    model_class = type("Model", (), {"generate": None})
    for mine, name in ((True, "mine"), (False, "llava")):
        config = SimpleNamespace(model_type="llava", mine=mine, vision_config=vision)
        assert family_of_class(model_class, config).name == name
