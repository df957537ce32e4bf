"""What a projector is: a trained module between the vision encoder and the LLM that gives fewer tokens than patches."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from foveate.core.compressor import Compressor, Grid, Sizes
from foveate.core.errors import FoveateError, InputError, UnknownNameError

__all__ = [
    "Compressor", "Grid", "Mlp", "Projector", "Retrofit", "Sizes", "as_maps", "divided", "get_projector", "heads_of",
    "list_projectors", "pooled", "projector_from_dict", "regions", "register_projector", "several_layers", "square",
    "trunc_normal",
]  # fmt: skip


class Retrofit(Compressor):
    """A compressor that starts exactly at the average of the stock projector's tokens, and learns what to add.

    Parameters
    ----------
    sizes
        Of the model.
    cells
        Rows and columns of the tokens.
    stock
        The model's own projector, ``[B, N, K]`` to ``[B, N, D]``.
    branch
        What is added; its output layer is set to zeros. `None`: nothing.
    stock_layers, branch_layers
        Which of the layers that lie side by side in the features the two read.
    """

    def __init__(
        self, sizes: Sizes, cells: Grid, stock: nn.Module, branch: Compressor | None,
        stock_layers: Sequence[int] = (-1,), branch_layers: Sequence[int] = (-1,),
    ) -> None:  # fmt: skip
        super().__init__(sizes)
        self.cells, self.stock, self.branch = cells, stock, branch
        self.stock_layers, self.branch_layers = tuple(stock_layers), tuple(branch_layers)
        if branch is not None:
            nn.init.zeros_(branch.output.weight)
            if branch.output.bias is not None:
                nn.init.zeros_(branch.output.bias)

    def forward(self, features: Tensor, **cues: Any) -> Tensor:
        """Map ``[B, N, L C]`` to ``[B, M, D]``; `cues` are those of the branch."""
        tokens = pooled(self.maps(self.stock(self._of(features, self.stock_layers))), self.cells)
        if self.branch is not None:
            tokens = tokens + self.branch(self._of(features, self.branch_layers), **cues)
        return tokens

    def _of(self, features: Tensor, layers: tuple[int, ...]) -> Tensor:
        each = features.reshape(*features.shape[:-1], -1, self.sizes.features)
        if layers == tuple(range(each.shape[-2])):
            return features
        return each[..., list(layers), :].flatten(-2)


@dataclass(frozen=True)
class Projector(ABC):
    """A trained compressor: its configuration, and what it builds of it.

    A frozen dataclass, as methods are: its `repr` goes into result files, `to_dict` into the folder of a model.
    """

    name: ClassVar[str]
    stage: ClassVar[str] = "projector"
    paper: ClassVar[str] = ""
    query_aware: ClassVar[bool] = False
    adds_features: ClassVar[bool] = True
    """Whether `retrofit` reads features of the encoder beside the stock projector's tokens."""

    @abstractmethod
    def cells(self, grid: Grid) -> Grid | None:
        """Return the rows and columns of tokens of one picture's grid of patches; `None` if they lie on no grid.

        Raises
        ------
        InputError
            If the projector cannot have such a grid.
        """

    def num_output_tokens(self, grid: Grid, tiles: int = 1, budget: int | None = None) -> int:
        """Return how many tokens `tiles` pictures or tiles of a grid of patches become.

        Raises
        ------
        InputError
            If the projector cannot have such a grid, or such a budget.
        """
        if budget is not None:
            raise InputError(f"{self.name} gives the tokens that its configuration says: not {budget}")
        cells = self.cells(grid)
        assert cells is not None, "a projector without cells counts its tokens itself"
        return tiles * math.prod(cells)

    @abstractmethod
    def build(self, sizes: Sizes) -> Compressor:
        """Return a new module for a model, initialised as the paper has it."""

    def retrofit(
        self, sizes: Sizes, stock: nn.Module, stock_layers: Sequence[int], branch_layers: Sequence[int]
    ) -> Compressor:
        """Return a new module that starts at the average of the tokens of `stock`, the model's own projector.

        See `Retrofit` for the layers.

        Raises
        ------
        InputError
            If the tokens lie on no grid to average over.
        """
        if (cells := self.cells(sizes.grid)) is None:
            raise InputError(f"the tokens of {self.name} lie on no grid, so none is an average: use start='paper'")
        return Retrofit(sizes, cells, stock, self.build(sizes), stock_layers, branch_layers)

    def build_beside(self, sizes: Sizes, encoder: nn.ModuleList) -> Compressor:
        """Return what `build` does, with copies of layers of the model's vision encoder where the paper has such."""
        return self.build(sizes)

    def layers(self, depth: int) -> tuple[int, ...]:
        """Return the hidden states that the module reads, 0 being the embeddings, of an encoder of `depth` layers.

        By default the last but one layer's output alone, as LLaVA.
        """
        return (depth - 1,)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that `projector_from_dict` reads."""
        return {"projector": self.name, **dataclasses.asdict(self)}


P = TypeVar("P", bound=type[Projector])
_registry: dict[str, type[Projector]] = {}


def register_projector(name: str) -> Callable[[P], P]:
    """Register a projector's configuration under a name, as a class decorator."""

    def decorate(cls: P) -> P:
        if name in _registry and _registry[name].__qualname__ != cls.__qualname__:
            raise FoveateError(f"the projector name {name!r} is taken by {_registry[name].__qualname__}")
        cls.name = name
        _registry[name] = cls
        return cls

    return decorate


def list_projectors(pattern: str = "*") -> list[str]:
    """Return the names of all projectors that match a shell-style pattern, sorted."""
    return sorted(fnmatch.filter(_registry, pattern))


def get_projector(name: str) -> type[Projector]:
    """Return the configuration registered under a name.

    Raises
    ------
    UnknownNameError
        If there is none; the message lists those there are.
    """
    if name not in _registry:
        raise UnknownNameError.among("no projector is called", name, list_projectors())
    return _registry[name]


def projector_from_dict(data: dict[str, Any]) -> Projector:
    """Build a configuration from the data of `Projector.to_dict`.

    Raises
    ------
    FoveateError
        If it describes no projector, or one with other parameters.
    """
    if not isinstance(data, dict) or not isinstance(data.get("projector"), str):
        raise InputError('a projector\'s configuration is an object with the keys "projector", ...')
    cls = get_projector(data["projector"])
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items() if key != "projector"}
    known = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted(given.keys() - set(known)):
        raise InputError(f"{cls.name} does not know {', '.join(unknown)}; its parameters are: {', '.join(known)}")
    try:
        return cls(**given)
    except TypeError as error:
        raise InputError(f"{cls.name} cannot use {given}: {error}") from error


def divided(name: str, grid: Grid, side: int) -> Grid:
    """Return a grid whose cells hold `side` x `side` patches.

    Raises
    ------
    InputError
        If the grid does not divide.
    """
    height, width = grid
    if side < 1 or height % side or width % side:
        fits = [k for k in range(1, min(grid) + 1) if height % k == 0 and width % k == 0]
        raise InputError(
            f"{name} makes one token of {side} x {side} patches, and {height} x {width} patches do not divide so: "
            f"choose one of {', '.join(map(str, fits))}"
        )
    return height // side, width // side


def square(name: str, tokens: int, grid: Grid) -> Grid:
    """Return the square grid of a number of tokens that a picture's grid can be pooled to.

    Raises
    ------
    InputError
        If the number is no square, or the grid is smaller.
    """
    side = math.isqrt(max(tokens, 0))
    if tokens < 1 or side * side != tokens or side > min(grid):
        raise InputError(
            f"{name} pools {grid[0]} x {grid[1]} patches to a square grid: {tokens} tokens are none of 1, 4, 9, ... "
            f"{min(grid) ** 2}"
        )
    return side, side


def pooled(maps: Tensor, grid: Grid) -> Tensor:
    """Average maps ``[B, K, H, W]`` over the cells of a grid ``(h, w)``; return rows ``[B, h w, K]``.

    Where sides do not divide, neighbouring cells overlap: cell i covers ``floor(i H / h)`` to ``ceil((i + 1) H / h)``.
    """
    return adaptive_avg_pool2d(maps, grid).flatten(2).transpose(1, 2)


def as_maps(rows: Tensor, grid: Grid) -> Tensor:
    """Return rows ``[B, H W, K]`` in raster order as maps ``[B, K, H, W]``."""
    return rows.transpose(1, 2).reshape(len(rows), -1, *grid)


def regions(rows: Tensor, grid: Grid, cells: Grid) -> Tensor:
    """Return rows ``[B, H W, K]`` by the cell they lie in, ``[B, h w, s s, K]``, both in raster order."""
    (height, width), (h, w) = grid, cells
    parts = rows.reshape(len(rows), h, height // h, w, width // w, -1).transpose(2, 3)
    return parts.reshape(len(rows), h * w, -1, rows.shape[-1])


class Mlp(nn.Sequential):
    """LLaVA's projector: two linear layers with an activation between, from `features` to `width` channels."""

    def __init__(self, features: int, width: int, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__(nn.Linear(features, width), activation(), nn.Linear(width, width))

    @property
    def output(self) -> nn.Linear:
        """The last layer."""
        last = self[2]
        assert isinstance(last, nn.Linear)
        return last


def several_layers(depth: int) -> tuple[int, ...]:
    """Return the four hidden states that TokenPacker and QueCC read: 12, 16, 22, 23 of CLIP-L's 24 layers.

    Of other encoders the same shares of the depth (UNVERIFIED), and never the last layer's output.
    """
    found = [round(depth * share) for share in (0.5, 0.667, 0.917, 0.958)]
    while max(found) >= depth:
        found = [layer - 1 for layer in found]
    return tuple(max(layer, 0) for layer in found)


def heads_of(features: int) -> int:
    """Return how many attention heads a module of so many channels has: 128 channels each, or 32 where that fits not.

    Raises
    ------
    InputError
        If neither divides.
    """
    for size in (128, 32):
        if features % size == 0:
            return features // size
    raise InputError(f"{features} channels divide neither by 128 nor by 32: give the number of heads")


def trunc_normal(modules: Sequence[nn.Module], std: float = 0.02) -> None:
    """Draw the weights of linear layers from a truncated normal distribution, with biases of zero."""
    for module in modules:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
