"""Questions as training sequences: all questions of an image behind one visual prefix, none seeing another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from foveate.nano.labels import TOKENS
from foveate.nano.questions import QUESTION_KINDS, Question
from foveate.nano.vocabulary import BOS, EOS, PAD
from training.nano.architecture import WORD_IDS

PREFIX = 1 + TOKENS
HIDDEN = -1e4


class Texts(NamedTuple):
    """A batch of question texts.

    Attributes
    ----------
    ids : torch.Tensor
        int64 ``[B, T]``.
    blocks : torch.Tensor
        int64 ``[B, T]``: which question a column belongs to; -1 is padding.
    offsets : torch.Tensor
        int64 ``[B, T]``: place within the question.
    rows, columns : torch.Tensor
        int64 ``[Q]``: where each answer is predicted; the end of the text is predicted one column later.
    answers : torch.Tensor
        int64 ``[Q]``: word ids.
    kinds : torch.Tensor
        int64 ``[Q]``: index into ``QUESTION_KINDS``.
    """

    ids: Tensor
    blocks: Tensor
    offsets: Tensor
    rows: Tensor
    columns: Tensor
    answers: Tensor
    kinds: Tensor


def words_of(question: str) -> list[str]:
    """Words as the tokenizer reads them: lower case, without the question mark."""
    return question.lower().replace("?", " ").split()


def pack(batch: Sequence[Sequence[Question]]) -> Texts:
    """Lay the questions of each image out one after the other.

    Parameters
    ----------
    batch : sequence of sequence of Question
        Questions per image.

    Returns
    -------
    Texts
        Padded on the right.
    """
    lines: list[list[tuple[int, int, int]]] = []
    found: list[tuple[int, int, int, int]] = []
    for row, questions in enumerate(batch):
        line: list[tuple[int, int, int]] = []
        for number, question in enumerate(questions):
            ids = [WORD_IDS[word] for word in (*words_of(question.text), question.answer)]
            answer = ids[-1]
            line += [(word, number, offset) for offset, word in enumerate(ids)]
            found.append((row, len(line) - 2, answer, QUESTION_KINDS.index(question.kind)))
        lines.append(line)
    longest = max(map(len, lines))
    table = np.full((3, len(batch), longest), -1, np.int64)
    table[0] = WORD_IDS[PAD]
    for row, line in enumerate(lines):
        if line:
            table[:, row, : len(line)] = np.asarray(line).T
    ids, blocks, offsets = torch.from_numpy(table)
    rows, columns, answers, kinds = torch.tensor(found, dtype=torch.int64).reshape(-1, 4).T
    return Texts(ids, blocks, offsets.clamp(min=0), rows, columns, answers, kinds)


def positions(texts: Texts, compression: Tensor) -> Tensor:
    """Rotary positions of prefix and text.

    Parameters
    ----------
    texts : Texts
        The batch.
    compression : torch.Tensor
        float ``[B]``, at least 1: visual ids are divided by it, and the text follows at once. All tokens stay;
        the decoder only learns not to rely on one distance between image and text.

    Returns
    -------
    torch.Tensor
        int64 ``[B, 257 + T]``.
    """
    visual = 1 + (torch.arange(TOKENS) / compression[:, None]).floor().long()
    start = torch.zeros(len(visual), 1, dtype=torch.int64)
    return torch.cat([start, visual, visual[:, -1:] + 1 + texts.offsets], 1)


def attention_mask(texts: Texts) -> Tensor:
    """Additive mask float32 ``[B, 1, S, S]``: causal, and a question sees the prefix and itself alone."""
    prefix = torch.full((len(texts.ids), PREFIX), -2)
    blocks = torch.cat([prefix, texts.blocks], 1)
    seen = (blocks[:, None, :] == -2) | (blocks[:, None, :] == blocks[:, :, None])
    length = blocks.shape[1]
    seen &= torch.ones(length, length, dtype=torch.bool).tril()
    return torch.where(seen, 0.0, HIDDEN)[:, None]


BOS_ID, EOS_ID = WORD_IDS[BOS], WORD_IDS[EOS]
