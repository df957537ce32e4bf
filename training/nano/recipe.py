"""The recipe: everything that decides the trained weights, as one frozen value and one file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

DEFAULT_PATH: Final = Path(__file__).with_name("recipe.json")


@dataclass(frozen=True)
class Stage:
    """One training stage.

    Attributes
    ----------
    steps : int
        Optimiser steps.
    batch : int
        Images per step, over all processes.
    learning_rate, weight_decay : float
        Of AdamW.
    warmup : int
        Steps of linear warm-up.
    decay_share : float
        Share of the steps, at the end, over which the learning rate falls linearly to zero.
    easy_share : float
        Share of images with at most four objects during the first ``easy_steps`` steps.
    easy_steps : int
        See ``easy_share``.
    """

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float
    warmup: int
    decay_share: float
    easy_share: float
    easy_steps: int

    def rate(self, step: int) -> float:
        """Learning rate at a step, counted from 0."""
        decay = (self.steps - step) / max(1.0, self.steps * self.decay_share)
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup), decay)


@dataclass(frozen=True)
class Recipe:
    """Data, architecture, stages and loss weights; ``recipe.json`` holds the one of the shipped weights.

    Attributes
    ----------
    dtype : str
        ``"float32"`` or ``"bfloat16"``: type of the forward and backward passes. Weights and updates are float32.
    """

    seed: int
    images: int
    decoder_images: int
    validation_images: int
    hidden_size: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    text_layers: int
    text_heads: int
    text_mlp: int
    rope_theta: float
    tower: Stage
    decoder: Stage
    align_weight: float
    cls_weight: float
    stop_weight: float
    evaluate_every: int
    save_every: int
    dtype: str = "float32"
    kind_weights: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Build a recipe from plain values; unknown or missing names raise ``TypeError``."""
        stages = {name: Stage(**values[name]) for name in ("tower", "decoder")}
        return cls(**{**values, **stages})

    @classmethod
    def load(cls, path: Path = DEFAULT_PATH) -> Recipe:
        """Read a recipe file."""
        return cls.from_dict(json.loads(Path(path).read_text()))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in the file."""
        return asdict(self)

    def save(self, path: Path) -> None:
        """Write a recipe file."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
