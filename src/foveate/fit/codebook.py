"""Building a codebook of redundant visual tokens (arXiv 2503.20540).

A visual token says little if a model that sees it alone is sure of no word, and if leaving it out changes no answer.
Tokens of that kind come back in image after image; those that do are the prototypes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.clustering import dpc_knn
from foveate.core.codebook import Codebook, projector_hash
from foveate.core.errors import FoveateError, InputError, UnsupportedModelError
from foveate.core.grids import middle
from foveate.core.probes import ClsToken, Embeddings, Features
from foveate.core.ranking import descending
from foveate.core.selection import Selection, SpanSelection
from foveate.core.spans import Crop, Span
from foveate.core.tokens import VisualTokens
from foveate.families import Family


def divergence(base: Tensor, other: Tensor, words: int = 10) -> Tensor:
    """Jensen-Shannon divergence of two next-token distributions over the words that `base` likes best.

    Parameters
    ----------
    base, other
        Logits ``[..., V]``, broadcast against each other.
    words
        How many words count; both distributions are taken over these alone.

    Returns
    -------
    Tensor
        ``[...]`` float64, in nats, the mean over the words instead of the sum.
    """
    base, other = torch.broadcast_tensors(base, other)  # type: ignore[no-untyped-call]
    best = descending(base)[..., :words]
    p, q = (x.gather(-1, best).double().log_softmax(dim=-1) for x in (base, other))
    mean = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, dtype=p.dtype))
    return (0.5 * (p.exp() * (p - mean) + q.exp() * (q - mean))).mean(dim=-1)


def neighbourhood(place: int, grid: tuple[int, int]) -> list[int]:
    """Return the up to 3 x 3 places of a grid around one of them, itself among them, in raster order."""
    height, width = grid
    row, column = divmod(place, width)
    rows = range(max(row - 1, 0), min(row + 2, height))
    columns = range(max(column - 1, 0), min(column + 2, width))
    return [r * width + c for r in rows for c in columns]


@dataclass(frozen=True)
class Recipe:
    """How a codebook is built; the defaults are those of the paper for LLaVA-1.5-7B.

    Attributes
    ----------
    samples
        Tokens tested per image, evenly spread over their ranks of similarity to ``[CLS]`` (to the mean feature where
        the encoder has no such token). UNVERIFIED beyond "about 96, by rank".
    repeat
        How many times the prompt holds the token in the single-token test. UNVERIFIED.
    confidence
        A token that alone makes the model this sure of a word, or surer, says something.
    vocabulary
        Number of likeliest words that this probability is taken over.
    divergence
        A token says something if the answer without it diverges by this much, or more.
    global_weight
        Weight of the divergence for the neighbourhood left out of the image, beside that for the token left out of its
        neighbourhood.
    image_clusters, largest
        Of an image, the tokens that say little are clustered, and large clusters go. UNVERIFIED that it is these tokens
        that are clustered.
    clusters, spread
        The tokens of all images are clustered, and the members of clusters with tokens of more than `spread` images are
        the prototypes. UNVERIFIED that it is all members, which the sizes of the published codebooks suggest.
    neighbours
        Of the density estimate. UNVERIFIED.
    batch
        Prompts per forward pass.
    """

    samples: int = 96
    repeat: int = 1
    confidence: float = 0.15
    vocabulary: int = 50
    divergence: float = 2e-3
    global_weight: float = 16.0
    image_clusters: int = 8
    largest: int = 8
    clusters: int = 64
    spread: int = 64
    neighbours: int = 5
    batch: int = 32


class Builder:
    """Collects the tokens that say little, image by image, and makes a codebook of those that come back.

    Parameters
    ----------
    model, family
        The model, and the family that it belongs to.
    recipe
        The settings.
    pad
        Id of the padding token, whose embedding stands for a token that is left out.

    Attributes
    ----------
    counts
        How many images were seen, how many of their tokens were tested, and how many passed each step.
    """

    def __init__(self, model: Any, family: Family, recipe: Recipe, pad: int):
        self.model, self.family, self.recipe, self.pad = model, family, recipe, pad
        self.counts = dict.fromkeys(("images", "tested", "unsure", "without_effect", "in_small_clusters"), 0)
        self._found: list[Tensor] = []
        self._confidence = self._effect = float("inf")

    @torch.inference_mode()
    def add(self, inputs: Mapping[str, Any]) -> None:
        """Test the tokens of a prompt with one image.

        Raises
        ------
        InputError
            If it is not one prompt with one image.
        UnsupportedModelError
            If the tokens of the image cannot be replaced by fewer of them.
        """
        spans, recipe = self.family.spans(self.model, inputs), self.recipe
        if len(spans) != 1 or len(inputs["input_ids"]) != 1:
            raise InputError(f"a codebook is built from single prompts with one image, not with {len(spans)}")
        tokens = self.family.encode(self.model, inputs, spans, (Features(), ClsToken(), Embeddings()))
        (span,) = spans
        everything = torch.arange(len(span), device=tokens.device)
        selection = Selection((SpanSelection(len(span), everything, extra=len(span.crops) if tokens.cls else 0),))
        (rows,) = self.family.embed(self.model, tokens, selection, None)
        ask = _Question(self.model, inputs["input_ids"], span, rows, self.pad, recipe.batch)
        places = [(crop, i) for crop in span.crops for i in range(len(crop))]
        places = [places[i] for i in spread_ranks(_likeness_to_cls(tokens), recipe.samples)]
        confidence = _confidence(ask.answers([_at(place).repeat(recipe.repeat) for place in places]), recipe.vocabulary)
        unsure = [place for place, x in zip(places, confidence, strict=True) if x < recipe.confidence]
        effect = self._leave_out(ask, unsure) if unsure else []
        little = [place for place, x in zip(unsure, effect, strict=True) if x < recipe.divergence]
        kept = self._without_large_clusters(rows[torch.cat([_at(p) for p in little])]) if little else rows[:0]
        self._found.append(kept.float().cpu())
        self._confidence = min([self._confidence, *confidence])
        self._effect = min([self._effect, *effect])
        for step, passed in zip(self.counts, (1, len(places), len(unsure), len(little), len(kept)), strict=True):
            self.counts[step] += passed

    def _leave_out(self, ask: _Question, places: Sequence[tuple[Crop, int]]) -> list[float]:
        """Return how much the answer diverges without a token, near by and in the image as a whole."""
        near, alone, whole = [], [], []
        for crop, i in places:
            assert crop.grid is not None
            around = crop.index[neighbourhood(i, crop.grid)]
            near.append(around)
            alone.append(around.masked_fill(around == crop.index[i], ask.left_out))
            whole.append(ask.everything.index_fill(0, around, ask.left_out))
        local = divergence(ask.answers(near), ask.answers(alone))
        in_all = divergence(ask.answers([ask.everything]), ask.answers(whole))
        effect: list[float] = (local + self.recipe.global_weight * in_all).tolist()
        return effect

    def _without_large_clusters(self, rows: Tensor) -> Tensor:
        labels, _ = dpc_knn(rows, min(self.recipe.image_clusters, len(rows)), self.recipe.neighbours)
        return rows[labels.bincount()[labels] <= self.recipe.largest]

    def codebook(self, name: str) -> Codebook:
        """Return the prototypes in the tokens seen so far.

        Parameters
        ----------
        name
            Name of the model.

        Raises
        ------
        FoveateError
            If there are none; the message says which step nothing passed.
        """
        counts, recipe = self.counts, self.recipe
        failed = f"no prototypes in {counts['images']} images"
        if not counts["unsure"]:
            raise FoveateError(
                f"{failed}: each of the {counts['tested']} tokens tested alone makes the model say something. The "
                f"lowest confidence is {self._confidence:.3g}, the limit {recipe.confidence:g}: raise it"
            )
        if not counts["without_effect"]:
            raise FoveateError(
                f"{failed}: each of the {counts['unsure']} tokens that say nothing alone changes an answer when left "
                f"out. The lowest divergence is {self._effect:.3g}, the limit {recipe.divergence:g}: raise it"
            )
        if not counts["in_small_clusters"]:
            raise FoveateError(
                f"{failed}: the {counts['without_effect']} tokens that say little are all in clusters of more than "
                f"{recipe.largest} in their image: raise the limit, or the number of clusters per image"
            )
        points = torch.cat(self._found)
        owner = torch.arange(len(self._found)).repeat_interleave(torch.tensor([len(x) for x in self._found]))
        labels, _ = dpc_knn(points, min(recipe.clusters, len(points)), recipe.neighbours)
        touched = torch.zeros(int(labels.max()) + 1, len(self._found), dtype=torch.bool)
        touched[labels, owner] = True
        images = touched.sum(dim=1)
        chosen = points[images[labels] > recipe.spread]
        if not len(chosen):
            raise FoveateError(
                f"{failed}: the {len(points)} tokens that say little form clusters from at most {int(images.max())} "
                f"images, and more than {recipe.spread} are asked for: take more images, fewer clusters, or less spread"
            )
        built = {"recipe": asdict(recipe), "counts": {**counts, "prototypes": len(chosen)}}
        return Codebook(chosen, name, projector_hash(self.family.projector(self.model)), built)


class _Question:
    """What a model answers first if the image in its prompt is replaced by a choice of its visual tokens.

    A choice is a vector of positions in the span; the position behind the last one stands for a token left out.
    """

    def __init__(self, model: Any, ids: Tensor, span: Span, rows: Tensor, pad: int, batch: int):
        embed, (first, last) = model.get_input_embeddings(), span.columns[[0, -1]].tolist()
        if last - first + 1 != len(span) or rows.shape[-1] != embed.weight.shape[-1]:
            raise UnsupportedModelError(
                f"{type(model).__name__} mixes an image's tokens with text, or gives its LLM more than one embedding "
                "per token: codebooks are made for models that do neither, such as LLaVA"
            )
        self.model, self.batch = model, batch
        self.before, self.after = embed(ids[:, :first]), embed(ids[:, last + 1 :])
        self.rows = torch.cat([rows, embed(ids.new_tensor([pad])).to(rows)])
        self.left_out, self.everything = len(rows), torch.arange(len(rows))

    def answers(self, choices: Sequence[Tensor]) -> Tensor:
        """Return the logits of the answers' first tokens ``[P, V]`` float32, batching choices of equal length."""
        order = sorted(range(len(choices)), key=lambda i: len(choices[i]))
        logits: list[Tensor] = []
        for _, group in itertools.groupby(order, key=lambda i: len(choices[i])):
            stacked = torch.stack([choices[i] for i in group]).to(self.rows.device)
            for part in torch.split(stacked, self.batch):
                visual = self.rows[part]
                text = (x.expand(len(part), -1, -1).to(visual.device) for x in (self.before, self.after))
                embeds = torch.cat([next(text), visual, next(text)], dim=1)
                logits.append(self.model(inputs_embeds=embeds, use_cache=False, logits_to_keep=1).logits[:, -1])
        return torch.cat(logits)[torch.tensor(order).argsort().to(logits[0].device)].float()


def _at(place: tuple[Crop, int]) -> Tensor:
    crop, i = place
    return crop.index[i : i + 1]


def _confidence(logits: Tensor, words: int) -> list[float]:
    best = logits.topk(min(words, logits.shape[-1]), dim=-1).values
    likeliest: list[float] = best.softmax(dim=-1)[:, 0].tolist()
    return likeliest


def _likeness_to_cls(tokens: VisualTokens) -> Tensor:
    """Return the cosine similarity of each token of one image to the ``[CLS]`` token (or the mean) of its crop."""
    features, (span,) = tokens.probe(Features()), tokens.spans
    centres = list(tokens.hidden[0][len(span) :]) if tokens.cls else [x.mean(dim=0) for x in features]
    pairs = zip(features, centres, strict=True)
    return torch.cat([nn.functional.cosine_similarity(x.float(), centre.float()[None]) for x, centre in pairs])


def spread_ranks(scores: Tensor, count: int) -> list[int]:
    """Return at most `count` indices of scores ``[N]`` whose ranks lie evenly apart, from high to low."""
    ranked: list[int] = descending(scores[None])[0].tolist()
    count = min(count, len(ranked))
    return [ranked[middle(i, count, len(ranked))] for i in range(count)]
