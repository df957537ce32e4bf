"""What a model is made of, as far as FLOPs go: read off a model without weights, built from its configuration.

The rule for matrices is one for all models: two FLOPs per weight and row that it multiplies. So nothing here knows a
projector's or an MLP's layout; only how many rows each part sees, and how wide attention is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from foveate.core.errors import UnsupportedModelError
from foveate.families import Family, family_of
from foveate.families.tower import EMBEDDINGS, MERGERS, attention_of

_STATE = "linear_attention"


@dataclass(frozen=True)
class Layer:
    """A transformer layer.

    Attributes
    ----------
    attention, rest
        FLOPs per token of the matrices in its attention module, and of all others.
    width
        Width of all query heads, of which a pair of tokens costs four FLOPs; 0 without attention.
    state
        FLOPs per token of a recurrence that takes the place of attention.
    window
        Tokens that a query reaches back, itself included; 0 if all.
    """

    attention: int
    rest: int
    width: int
    state: int = 0
    window: int = 0

    @property
    def matrices(self) -> int:
        """FLOPs per token, whatever the length of the sequence."""
        return self.attention + self.rest + self.state


@dataclass(frozen=True)
class Tower:
    """A vision tower.

    Attributes
    ----------
    embedding
        FLOPs per patch before the first layer.
    lead
        Tokens before the patches of a picture, such as ``[CLS]``.
    read
        Layers up to the last one whose output the projector reads.
    patch
        Height and width of a patch in pixels.
    window
        Patches that the windows are high and wide, in which layers attend; 0 if they attend to whole pictures.
    whole
        Layers that attend to whole pictures nevertheless.
    packed
        Whether all pictures of a batch attend as one sequence, under a mask.
    grid
        Rows and columns of patches of every picture; `None` if it takes pictures of any size.
    """

    embedding: int
    layers: tuple[Layer, ...]
    lead: int
    read: int
    patch: tuple[int, int]
    window: int = 0
    whole: frozenset[int] = frozenset()
    packed: bool = False
    grid: tuple[int, int] | None = None

    @property
    def whole_layers(self) -> Sequence[int] | None:
        """The layers that attend to whole pictures, where others attend within windows; else `None`."""
        return sorted(self.whole) if self.window else None


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of a vision-language model.

    Attributes
    ----------
    model
        The model without weights.
    tower
        `None` if the encoder is no stack of transformer layers.
    projector
        FLOPs per row.
    merges
        Patches that make a row of the projector.
    decoder
        The layers of the LLM.
    lm_head
        FLOPs of the logits of a token.
    """

    family: Family
    model: Any
    tower: Tower | None
    projector: int
    merges: int
    decoder: tuple[Layer, ...]
    lm_head: int


def anatomy_of(config: Any, model_class: Any = None) -> Anatomy:
    """Take a model apart by its configuration.

    Parameters
    ----------
    config
        Configuration of a vision-language model of `transformers`.
    model_class
        Its class, if it is not the one that `AutoModelForImageTextToText` takes.

    Raises
    ------
    UnsupportedModelError
        If no family knows the model.
    """
    # The repr says everything of a configuration; with the class it is the key of what was built before.
    return _anatomy(_Key(config, model_class))


class _Key:
    def __init__(self, config: Any, model_class: Any):
        self.config, self.model_class = config, model_class
        self.value = (type(config), model_class, config.to_json_string(use_diff=False))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)


@lru_cache(maxsize=16)
def _anatomy(key: _Key) -> Anatomy:
    model = skeleton(key.config, key.model_class)
    family, config = family_of(model), model.config
    text = config.get_text_config()
    encoder = family.encoder(model)
    return Anatomy(
        family, model, None if encoder is None else _tower(family, model, encoder),
        _projector(family, model, encoder), family.patches_per_row(model),
        tuple(_decoder(model, text)), 2 * text.hidden_size * text.vocab_size,
    )  # fmt: skip


def skeleton(config: Any, model_class: Any = None) -> Any:
    """Build a model without weights, on the meta device."""
    model_class = model_class or AutoModelForImageTextToText._model_mapping.get(type(config), None)
    if model_class is None:
        raise UnsupportedModelError(
            f"a model of type {config.model_type!r} does not answer questions about images: its costs are not known"
        )
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # the others may ask for packages that counting does not need
    with torch.device("meta"):
        return model_class._from_config(config).eval()


def matrices(module: nn.Module, active: float = 1.0) -> int:
    """Return the FLOPs of all matrices and convolutions of a module per row (or output position).

    Tables of embeddings do not multiply, and count nothing.

    Parameters
    ----------
    active
        Share of a mixture's experts that a token goes through.
    """
    return sum(_own(name, part, active) for name, part in module.named_modules())


def _own(name: str, part: nn.Module, active: float) -> int:
    if isinstance(part, nn.Linear):
        return 2 * part.in_features * part.out_features
    if isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return 2 * part.weight.numel()
    if isinstance(part, nn.Embedding):
        return 0
    own = 0
    for parameter in part.parameters(recurse=False):
        if parameter.dim() == 2:  # a matrix of its own, such as a router's
            own += 2 * parameter.numel()
        # transformers keeps the matrices of all experts of a mixture in one parameter.
        elif parameter.dim() == 3 and name.rpartition(".")[2] == "experts":
            own += round(2 * parameter.numel() * active)
    return own


def _decoder(model: Any, text: Any) -> Iterator[Layer]:
    query, _ = attention_widths(text)
    # Each mixture of experts has a name of its own for their number.
    experts = next(
        (n for n in map(text.to_dict().get, ("num_experts", "n_routed_experts", "num_local_experts")) if n), 0
    )
    active = text.num_experts_per_tok / experts if experts else 1.0
    for layer, kind in zip(model.get_decoder().layers, layer_types(text), strict=True):
        attends = kind.endswith("attention") and kind != _STATE  # linear attention has a state instead of pairs
        own = next((child for name, child in layer.named_children() if name == "self_attn"), None)
        attention = 0 if own is None else matrices(own)
        window = (getattr(text, "sliding_window", None) or 0) if kind == "sliding_attention" else 0
        yield Layer(
            attention, matrices(layer, active) - attention, query if attends else 0,
            _recurrence(text) if kind == _STATE else 0, window,
        )  # fmt: skip


def layer_types(text: Any) -> list[str]:
    """Return the kind of each layer of the LLM, in the words of `transformers`."""
    return list(getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers)


def attention_widths(text: Any) -> tuple[int, int]:
    """Return the widths of all query heads and of all key heads of the LLM."""
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return heads * size, (getattr(text, "num_key_value_heads", None) or heads) * size


def _recurrence(text: Any) -> int:
    """FLOPs per token of a gated delta rule: what the state holds of the key, its update, and what the query reads."""
    return int(6 * text.linear_num_value_heads * text.linear_key_head_dim * text.linear_value_head_dim)


def _tower(family: Family, model: Any, encoder: nn.Module) -> Tower:
    return Tower(
        sum(_own(name, part, 1.0) for name, part in encoder.named_modules() if _projects_patches(name, part)),
        tuple(map(_vision_layer, family.layers(model))), family.lead(model), family.read_layer(model) + 1,
        family.patch_size(model), family.window(model), frozenset(family.whole_layers(model) or ()),
        family.packs_pictures, family.picture_grid(model),
    )  # fmt: skip


def _projects_patches(name: str, part: nn.Module) -> bool:
    return _within(name, EMBEDDINGS) and isinstance(part, nn.Linear | nn.Conv2d | nn.Conv3d)


def _within(name: str, parts: tuple[str, ...]) -> bool:
    return not set(name.split(".")).isdisjoint(parts)


def _vision_layer(layer: nn.Module) -> Layer:
    attention = attention_of(layer)
    own = matrices(attention)
    for name, part in attention.named_modules():
        if isinstance(part, nn.Linear) and name.rpartition(".")[2] in ("qkv", "q_proj"):  # Qwen's and timm's is one
            width = part.out_features // (3 if name.endswith("qkv") else 1)
            return Layer(own, matrices(layer) - own, width)
    raise UnsupportedModelError(f"no query projection found in {type(attention).__name__}: its costs are not known")


def _projector(family: Family, model: Any, encoder: nn.Module | None) -> int:
    if family.opaque:
        return 0
    module = family.projector(model)
    # Ovis 2 multiplies its table of visual words with shares of each, where others look rows up.
    whole = 2 * module.weight.numel() if isinstance(module, nn.Embedding) else matrices(module)
    inside = set(module.modules())
    rest = () if encoder is None else encoder.named_modules()
    # Encoders that merge patches, and that of Ovis 2, keep a part of the way to the LLM inside.
    return whole + sum(_own(name, m, 1.0) for name, m in rest if _within(name, MERGERS) and m not in inside)
