"""Tiny random models of every family, batches for them without processors, and tokens for methods."""

from __future__ import annotations

import functools
import tempfile
from collections import ChainMap
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.core.codebook import Codebook, projector_hash
from foveate.core.encoder import EncoderReducer, Inside
from foveate.core.exit_gates import Gates
from foveate.core.probes import ClsToken, Embeddings, Features, Keys, LayerProbe, Members, Query
from foveate.core.reducer import Reducer
from foveate.core.spans import Crop, Span
from foveate.core.tokens import VisualTokens
from foveate.families import family_of
from foveate.registry import get_method
from tiny_families import TINIES, Tiny, Visual
from tiny_families.base import IMAGE, PAD, VIDEO  # noqa: F401  the tests' names of the placeholders
from tiny_families.generic_classes import GENERICS

FAMILIES = list(TINIES)
ALL = ChainMap(TINIES, GENERICS)
CORE = ("llava", "llava_next", "video_llava")
WIDTH = 12


def in_depth(family: str) -> Any:
    """Return the marks of a test in depth: families beside the core run it where CI asks for slow tests."""
    return [] if family in CORE else pytest.mark.slow


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("random", {"seed": 3}),
    ("uniform", {}),
    ("pool", {}),
    ("downsample", {}),
    ("fastervlm", {}),
    ("vispruner", {}),
    ("vispruner", {"order": "rank", "important_ratio": 0.25, "step": 4}),
    ("vispruner", {"step": None}),
    ("vtc_cls", {"start": 1 / 3}),  # of three layers the projector may read the second
    ("vtc_cls", {"start": 0.5, "reduce": "min"}),
    ("hiprune", {}),
    ("hiprune", {"alpha": 0.8, "wrap": False}),
    ("holov", {}),
    ("holov", {"regions": None}),
    ("mmr", {}),
    ("todre", {}),
    ("todre", {"criterion": "k_center"}),
    ("prunesid", {}),
    ("agilepruner", {}),
    ("gaze", {}),
    ("gaze", {"saliency": 0.0, "spread": 0.5}),
    ("gaze_query", {}),
    ("fsr", {}),
    ("fsr", {"focus": 0.3}),
    ("divprune", {}),
    ("cdpruner", {}),
    ("cdpruner", {"theta": 0.5}),
    ("scope", {}),
    ("mmtok", {}),
    ("tops", {}),
    ("dart", {}),
    ("gprune", {}),
    ("codebook", {}),
    ("codebook", {"score": "softmax"}),
    ("visionzip", {}),
    ("visionzip", {"contextual_ratio": 0.4, "merge": "mean"}),
    ("visiondrop", {}),
    ("prumerge", {}),
    ("prumerge+", {"neighbours": 5, "layer": -1}),
    ("text_interaction_image", {"adaptive": False}),
    ("text_interaction_image", {"adaptive": False, "similarity": "attention"}),
    ("vflowopt", {}),
    ("vflowopt", {"t": 1.2, "a": 2.5}),
    ("tome", {}),
    ("tome", {"proportional": False}),
    ("flowcut", {}),
    ("flowcut", {"entropy": 0.2}),
]
"""All methods that reduce images, with the parameters beside `keep`."""

VIDEO_METHODS: list[tuple[str, dict[str, Any]]] = [("evs", {})]
"""Methods that leave images alone."""


def method_id(entry: Any) -> str:
    """Name a method and its parameters, without those that are files, whose names differ from run to run."""
    name, config = entry
    return "-".join([name, *(f"{k}={v}" for k, v in config.items() if k not in ("gates", "codebook"))])


def make(entry: tuple[str, dict[str, Any]], keep: Any, family: str | None = None) -> Reducer:
    """Make a method for a family's tiny model, or for the tokens of `visual_tokens`."""
    name, config = entry
    if name == "codebook":
        config = {"codebook": codebook_file(family), **config}
    return get_method(name)(keep=keep, **config)


_files = tempfile.TemporaryDirectory(prefix="foveate-tests-")


@functools.cache
def codebook_file(family: str | None) -> str:
    """Write a codebook of random prototypes."""
    width, projector = WIDTH, "none"
    if family is not None:
        net = model(family)
        width, projector = net.get_input_embeddings().weight.shape[-1], projector_hash(family_of(net).projector(net))
    path = f"{_files.name}/{family}.safetensors"
    prototypes = torch.randn(7, width, generator=torch.Generator().manual_seed(5))
    Codebook(prototypes, str(family), projector).save(path)
    return path


def model(family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    return ALL[family].model(attention, dtype)


def deep_model(family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """Return a family's model with an LLM of four layers."""
    return TINIES[family].deep_model(attention, dtype)


def gates_file() -> str:
    """Write random gates for LLMs as wide as those of the tiny models."""
    path = f"{_files.name}/gates.safetensors"
    Gates(range(4), 32, 16).initialise(6).save(path)
    return path


IN_LLM: list[tuple[str, dict[str, Any]]] = [
    ("fastv", {"keep": 9, "layer": 1}),
    ("fastv", {"keep": 0.3, "layer": 2, "query": "text"}),
    ("fastv", {"keep": 7, "layer": 3, "query": "all"}),
    ("fastv", {"keep": 0.3, "layer": 1, "per_image": True}),
    ("pyramiddrop", {}),
    ("pyramiddrop", {"keep": 0.4, "layers": (1, 3)}),
    ("sparsevlm", {"keep": 0.3}),
    ("sparsevlm", {"keep": 0.5, "recycle": 0.0}),
    ("sparsevlm+", {"keep": 0.3}),
    ("topv", {"keep": 0.4, "layer": 1}),
    ("topv", {"keep": 0.2, "layer": 2, "recovery": 0, "target": "output", "score": "cost"}),
    ("text_interaction_llm", {"keep": 0.4, "layer": 1}),
    ("visiondrop_llm", {"keep": 0.5}),
    ("visiondrop_llm", {"keep": 0.45, "layers": (1,), "contextual_ratio": 0.0, "rows": "visible"}),
    ("todre_exit", {"tau": 0.86}),
    ("vflowopt_llm", {"keep": 0.4}),
    ("vflowopt_llm", {"keep": 0.6, "t": 1.2, "layers": (2,)}),
    ("visual_exit", {}),
    ("visual_exit", {"keep": 0.25, "rule": "mass", "threshold": 0.9}),
    ("visual_exit", {"keep": 0.25, "rule": "converged", "threshold": 0.5}),
    ("dyvte", {"gates": gates_file(), "bias": -0.3}),
]
"""Methods that act inside the LLM, with parameters for one of four layers."""

STAGED: list[tuple[str, dict[str, Any]]] = [
    ("visiondrop_all", {"keep": 0.4}),
    ("todre_all", {"keep": 0.4, "tau": 0.6}),
    ("vflowopt_all", {"keep": 0.4, "t": 1.2, "a": 2.5}),
    ("text_interaction", {"keep": 0.4, "layer": 1}),
]
"""Methods with stages before and inside the LLM, with parameters for one of four layers."""


def of_each_kind(methods: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Return entries, all but the first of each kind as slow tests.

    Methods of a kind have the same stage, probes, merging and pictures, which is all that an engine asks of them.
    """
    kinds, entries = set(), []
    for entry in methods:
        reducer = make(entry, 9)
        kind = (reducer.stage, frozenset(map(type, reducer.needs)), reducer.merges, reducer.video_only)
        entries.append(pytest.param(entry, marks=pytest.mark.slow) if kind in kinds else entry)
        kinds.add(kind)
    return entries


IN_LLM_FAMILIES = [name for name in FAMILIES if name not in ("lfm2_vl", "qwen3_5")]
"""Families with attention in every layer of the LLM."""

Part = int | str | Visual
"""So many text tokens, "image" for a picture of LLaVA, or a picture or video of another family."""

VISUALS: dict[str, list[Visual]] = {name: [Visual(name, what) for what in t.visuals] for name, t in ALL.items()}


def sample(*parts: Part, seed: int = 0) -> dict[str, list[Any]]:
    """Make one prompt from its parts; the same seed and parts make the same prompt in any batch."""
    generator = torch.Generator().manual_seed(seed)
    out: dict[str, list[Any]] = {"ids": [], "families": []}
    for part in parts:
        if isinstance(part, int):
            out["ids"] += torch.randint(3, 110, (part,), generator=generator).tolist()
            continue
        visual = Visual("llava", part) if isinstance(part, str) else part
        out["families"].append(visual.family)
        for key, values in ALL[visual.family].place(visual.what, generator).items():
            out.setdefault(key, []).extend(values)
    return out


def samples(family: str) -> list[dict[str, list[Any]]]:
    """Make three prompts of different lengths, the second with two pictures or videos."""
    a, b, c = VISUALS[family]
    return [sample(4, a, 5, seed=1), sample(2, b, 3, c, 6, seed=2), sample(1, c, 9, seed=3)]


def collate(rows: list[dict[str, list[Any]]], side: str = "left", labels: bool = False) -> dict[str, Tensor]:
    """Pad prompts to one batch of model inputs."""
    length = max(len(row["ids"]) for row in rows)
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        n = len(row["ids"])
        place = slice(length - n, length) if side == "left" else slice(0, n)
        ids[i, place] = torch.tensor(row["ids"])
        mask[i, place] = 1
    out = {"input_ids": ids, "attention_mask": mask}
    if families := [name for row in rows for name in row["families"]]:
        tiny = ALL[families[0]]
        keys = dict.fromkeys(key for row in rows for key in row if key not in ("ids", "families"))
        out |= tiny.collate({key: [row.get(key, []) for row in rows] for key in keys})
        if tiny.type_plane:
            out[tiny.type_plane] = tiny.types(ids)
    if labels:
        # A row's first token would be predicted from padding, or not at all.
        first = mask.cumsum(1) == 1
        out["labels"] = ids.masked_fill((mask == 0) | first | (ids > 110), -100)
    return out


def tiny_of(model: Any) -> Tiny:
    """Return what the tests know of a model's family."""
    return next(tiny for tiny in ALL.values() if type(tiny.original) is type(model))


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}


def visual_tokens(
    reducer: Reducer,
    layout: list[tuple[int, list[tuple[int, int]]]],
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    only: int | None = None,
    kind: str = "image",
) -> VisualTokens:
    """Make tokens for a method: per span the row of its prompt and the grids of its crops.

    Each crop is followed by a separator. Values depend on the span and the crop alone, so that `only` one span of a
    layout (whose prompt then is row 0) has the values that it has among the others.
    """
    spans: list[Span] = []
    queries: list[tuple[int, Tensor]] = []
    members: list[Tensor] = []
    planes: dict[Any, list[Tensor]] = {
        probe: [] for probe in (Features(), *reducer.needs) if not isinstance(probe, Query | ClsToken | Members)
    }
    for i, (row, grids) in enumerate(layout):
        if only not in (None, i):
            continue
        crops, start = [], 0
        for j, (h, w) in enumerate(grids):
            crops.append(Crop(torch.arange(start, start + h * w), (h, w)))
            start += h * w + 1
            generator = torch.Generator().manual_seed(1000 * seed + 10 * i + j)
            for probe, plane in planes.items():
                values = torch.randn(h * w, *_width(probe), generator=generator)
                plane.append((values if isinstance(probe, FEATURES) else values.exp()).to(dtype))
        sample_row = 0 if only is not None else row
        ordinal = sum(s.sample == sample_row for s in spans)
        spans.append(Span(kind, sample_row, ordinal, torch.arange(start), (len(grids), *grids[0]), tuple(crops)))
        if isinstance(reducer, EncoderReducer):
            for j, (crop, count) in enumerate(zip(crops, spans[-1].budget(reducer.keep), strict=True)):
                generator = torch.Generator().manual_seed(1000 * seed + 10 * i + j)
                members.append(_members(reducer, len(crop), count, generator, dtype))
        # Prompts of different lengths, the same words for the same prompt.
        generator = torch.Generator().manual_seed(1000 * seed + row)
        queries.append((sample_row, torch.randn(3 + row % 2, WIDTH, generator=generator).to(dtype)))
    words = tuple(dict(queries).values()) if Query() in reducer.needs else None
    if members:
        planes[Members()] = members
    cls = ClsToken() in reducer.needs
    return VisualTokens(tuple(spans), planes, torch.device("cpu"), cls=cls, queries=words)


def _members(reducer: EncoderReducer, size: int, count: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Let a method act on three layers of an encoder of which it reads random values."""
    inside, x = Inside.start(1, size, 1, torch.device("cpu")), torch.zeros(1, 1 + size, 1)
    for left in reducer.schedule(size, count, 3) if 0 < count < size else ():
        for probe in reducer.needs:
            values = torch.randn(1, inside.sizes.shape[1], *_width(probe), generator=generator)
            inside.planes[probe] = (values if isinstance(probe, FEATURES) else values.exp()).to(dtype)
        inside, x = inside.step(reducer, x, left)
    return inside.homes[0]


FEATURES = (Features, Embeddings, Keys)


def _width(probe: Any) -> tuple[int, ...]:
    if isinstance(probe, FEATURES):
        return (WIDTH,)
    return (2,) if isinstance(probe, LayerProbe) and probe.stacked else ()


def embedded_rows(reduced: Any) -> list[Tensor]:
    """Return what the LLM gets of each span, ``[K, D]``."""
    rows: dict[str, Any] = {}
    for kind, output in reduced["mm_encoder_outputs"].items():
        pooled = output.pooler_output
        flat = pooled.flatten(0, -2) if isinstance(pooled, Tensor) else torch.cat(list(pooled))
        rows[kind] = iter(flat.split([len(span) for span in reduced.selection if span.kind == kind]))
    return [next(rows[span.kind]) for span in reduced.selection]


def table_flops(name, counter):
    """Return what a family spends on resizing its position table by a matrix product: large in tiny models only."""
    flops = {module: sum(ops.values()) for module, ops in counter.get_flop_counts().items()}
    embeddings = [module for module in flops if name == "lfm2_vl" and module.endswith("VisionModel.embeddings")]
    embeddings += [module for module in flops if name == "lfm2_vl" and module.endswith(".vision_tower.embeddings")]
    return sum(flops[module] - flops.get(f"{module}.patch_embedding", 0) for module in embeddings)
