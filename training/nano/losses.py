"""What the tower, the projector and the decoder are trained for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.nano.labels import CENTER, COLOR, DIGIT, KIND, REGION
from foveate.nano.vocabulary import ALL_COLORS, DIGITS, KINDS, REGIONS
from training.nano.architecture import ALIGNED, CENTER_SCALE, REGION_SCALE, WORD_IDS, Weights

# Most patches show background; it counts less.
BACKGROUND_WEIGHT = 0.15
SHARPNESS = 8.0
_SIZES = [len(KINDS) + 1, len(ALL_COLORS), len(REGIONS), len(DIGITS), 1]
_COLUMNS = (KIND, COLOR, REGION, DIGIT)
_PART_WEIGHTS = (1.0, 1.0, 0.5, 0.5)


def split_logits(logits: Tensor) -> tuple[Tensor, ...]:
    """Cut scores over ``ALIGNED`` ``[..., 53]`` into kind, colour, region, digit and centre."""
    return torch.split(logits, _SIZES, -1)


def patch_weights(labels: Tensor) -> Tensor:
    """How much each patch counts, ``[B, 256]``: objects 1, background little, undecided ones nothing."""
    kind = labels[..., KIND]
    return (kind > 0).float() + BACKGROUND_WEIGHT * (kind == 0).float()


def naming_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of naming kind, colour, region, digit and centre of every patch.

    Parameters
    ----------
    logits : torch.Tensor
        float32 ``[B, 256, 53]`` over ``ALIGNED``.
    labels : torch.Tensor
        int64 ``[B, 256, 5]``.

    Returns
    -------
    torch.Tensor
        Scalar.
    """
    *parts, center = split_logits(logits)
    weights = patch_weights(labels)
    total = torch.zeros(())
    for part, column, factor in zip(parts, _COLUMNS, _PART_WEIGHTS, strict=True):
        target = labels[..., column]
        counted = weights * (target >= 0)
        loss = F.cross_entropy(part.flatten(0, 1), target.clamp(min=0).flatten(), reduction="none")
        total = total + factor * (loss * counted.flatten()).sum() / counted.sum().clamp(min=1.0)
    is_center = labels[..., CENTER].float()
    loss = F.binary_cross_entropy_with_logits(center[..., 0], is_center, reduction="none")
    return total + 0.5 * (loss * weights).sum() / weights.sum()


def visual_targets(words: Tensor, places: Tensor, labels: Tensor) -> Tensor:
    """What the projector should emit: the sum of the words that describe a patch, and its place.

    Parameters
    ----------
    words : torch.Tensor
        Initial word embeddings ``[vocabulary, D]``.
    places : torch.Tensor
        Code of the places ``[256, D]``.
    labels : torch.Tensor
        int64 ``[B, 256, 5]``.

    Returns
    -------
    torch.Tensor
        ``[B, 256, D]``.
    """
    kinds, colors, regions, digits, center = torch.split(words[_aligned_ids()], _SIZES)
    target = kinds[labels[..., KIND].clamp(min=0)] + colors[labels[..., COLOR].clamp(min=0)]
    target = target + REGION_SCALE * regions[labels[..., REGION]] + places
    digit = labels[..., DIGIT]
    target = target + digits[digit.clamp(min=0)] * (digit >= 0)[..., None]
    return target + CENTER_SCALE * labels[..., CENTER, None] * center[0]


def align_loss(projected: Tensor, words: Tensor, places: Tensor, labels: Tensor) -> Tensor:
    """Squared distance to ``visual_targets``, plus naming with the words themselves as classifier."""
    weights = patch_weights(labels)
    distance = (projected - visual_targets(words, places, labels)).square().sum(-1)
    naming = naming_loss(SHARPNESS * (projected @ words[_aligned_ids()].T) - _center_offset(), labels)
    return (distance * weights).sum() / weights.sum() + 0.5 * naming


def _aligned_ids() -> list[int]:
    return [WORD_IDS[word] for word in ALIGNED]


def _center_offset() -> Tensor:
    """Puts the threshold of the centre's score half-way between centre and no centre."""
    offset = torch.zeros(len(ALIGNED))
    offset[-1] = SHARPNESS * CENTER_SCALE / 2
    return offset


def cls_loss(weights: Weights, before: Tensor, last: Tensor, present: Tensor) -> Tensor:
    """Binary cross entropy of what the image shows, told by ``[CLS]`` of the last two layers."""
    total = torch.zeros(())
    for name, state in (("cls_before", before), ("cls_last", last)):
        normal = F.layer_norm(state, state.shape[-1:])
        logits = F.linear(normal, weights[f"heads.{name}.weight"], weights[f"heads.{name}.bias"])
        total = total + F.binary_cross_entropy_with_logits(logits.float(), present)
    return total / 2
