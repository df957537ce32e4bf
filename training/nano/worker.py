"""One training process: draws its share of the images, then trains tower and decoder in step with the others."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from foveate.nano.labels import CENTER, COLOR, DIGIT, KIND, REGION, TOKENS, concepts
from foveate.nano.questions import QUESTION_KINDS, Question, ask
from foveate.nano.scenes import generator, plan_scene
from training.nano.architecture import ALIGNED, WORD_IDS, Weights, initial_weights, visual_words
from training.nano.data import Drawn, draw, open_drawn, table
from training.nano.lean import TEXT, decode, project, tower
from training.nano.losses import align_loss, cls_loss, naming_loss, split_logits
from training.nano.optimizer import FlatAdamW
from training.nano.recipe import Recipe, Stage
from training.nano.texts import BOS_ID, EOS_ID, Texts, attention_mask, pack, positions

DATA_SEED = 0
LARGEST_COMPRESSION = 16.0


class Worker:
    """State of one process.

    Parameters
    ----------
    recipe : Recipe
        What to train.
    out : Path
        Folder of the cache, the checkpoints, the log and the result.
    rank, world : int
        This process and how many there are.
    """

    def __init__(self, recipe: Recipe, out: Path, rank: int = 0, world: int = 1) -> None:
        self.recipe, self.out, self.rank, self.world = recipe, out, rank, world
        if rank:
            self.wait()  # the first process makes the files; another must not read one that is half made
        cache = out / "cache"
        self.train = open_drawn(cache, "train", recipe.images)
        self.validation = open_drawn(cache, "validation", recipe.validation_images)
        if not rank:
            self.wait()
        self.words, self.places = visual_words(recipe)
        self.dtype: torch.dtype = getattr(torch, recipe.dtype)
        self.started = time.monotonic()

    def log(self, **values: object) -> None:
        """Append one line to ``log.jsonl`` (first process only)."""
        if self.rank == 0:
            values["seconds"] = round(time.monotonic() - self.started, 1)
            with (self.out / "log.jsonl").open("a") as lines:
                lines.write(json.dumps(values) + "\n")

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            dist.barrier()

    def total(self, values: Tensor) -> Tensor:
        """Sum over processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def draw(self) -> None:
        """Draw this process's share of the images, unless that has been done."""
        done = self.out / "cache" / f"drawn-{self.rank}-of-{self.world}"
        if not done.exists():
            for split, drawn in (("validation", self.validation), ("train", self.train)):
                for index in range(self.rank, len(drawn.images), self.world):
                    draw(drawn, split, DATA_SEED, index)
            done.touch()
        self.wait()

    def batches(self, name: str, stage: Stage, first: int, images: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Steps from ``first`` on, each with this process's image numbers; they depend on seed and step alone."""
        easy = np.flatnonzero(np.asarray(self.train.labels[:images, :, CENTER]).sum(1) <= 4)
        for step in range(first, stage.steps):
            rng = generator("order", self.recipe.seed, name, step)
            chosen = rng.integers(images, size=stage.batch)
            if step < stage.easy_steps and len(easy):
                swap = rng.random(stage.batch) < stage.easy_share
                chosen[swap] = easy[rng.integers(len(easy), size=int(swap.sum()))]
            yield step, chosen[self.rank :: self.world]

    def train_tower(self, stop: int | None = None) -> Weights:
        """Train vision tower and projector to name what each patch shows; resumes from its checkpoint.

        Parameters
        ----------
        stop : int, optional
            Leave after this step, as if interrupted.

        Returns
        -------
        dict of torch.Tensor
            float32 weights of tower, projector and heads.
        """
        stage, path = self.recipe.tower, self.out / "tower.safetensors"
        initial = {k: v for k, v in initial_weights(self.recipe).items() if not k.startswith(TEXT)}
        optimizer = FlatAdamW(initial, stage.weight_decay, dtype=self.dtype)
        if path.exists():
            optimizer.restore(path)
        weights = optimizer.weights
        for step, chosen in self.batches("tower", stage, optimizer.step_count, self.recipe.images):
            if step == stop:
                break
            loss = self._tower_loss(weights, self.train, chosen)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step(stage.rate(step))
            if step % 20 == 0:
                self.log(stage="tower", step=step, loss=round(loss.item(), 4))
            self._checkpoint(optimizer, path, step + 1, stage)
            if (step + 1) % self.recipe.evaluate_every == 0 or step + 1 == stage.steps:
                self.log(stage="tower", step=step + 1, **self.evaluate_tower(optimizer.trained()))
        return optimizer.trained()

    def _checkpoint(self, optimizer: FlatAdamW, path: Path, done: int, stage: Stage) -> None:
        if self.rank == 0 and (done % self.recipe.save_every == 0 or done == stage.steps):
            optimizer.save(path)

    def _tower_loss(self, weights: Weights, drawn: Drawn, chosen: NDArray[np.int64]) -> Tensor:
        table = np.asarray(drawn.labels[chosen])
        labels = torch.from_numpy(table).long()
        features, before, last = tower(weights, self.recipe, torch.from_numpy(drawn.images[chosen]))
        named = F.linear(features, weights["heads.dense.weight"], weights["heads.dense.bias"]).float()
        aligned = align_loss(project(weights, features).float(), self.words, self.places, labels)
        overall = cls_loss(weights, before, last, torch.from_numpy(concepts(table)))
        return naming_loss(named, labels) + aligned + self.recipe.cls_weight * overall

    @torch.no_grad()
    def evaluate_tower(self, weights: Weights) -> dict[str, float]:
        """Shares of validation patches named rightly by the projected tokens themselves."""
        words = self.words[[WORD_IDS[word] for word in ALIGNED]]
        right, seen = torch.zeros(5), torch.zeros(5)
        for start in range(self.rank * 8, min(160, len(self.validation.images)), 8 * self.world):
            labels = torch.from_numpy(np.asarray(self.validation.labels[start : start + 8])).long()
            images = torch.from_numpy(np.asarray(self.validation.images[start : start + 8]))
            features, _, _ = tower(weights, self.recipe, images)
            *parts, center = split_logits(project(weights, features).float() @ words.T)
            is_object = labels[..., KIND] > 0
            for place, (part, column) in enumerate(zip(parts, (KIND, COLOR, REGION, DIGIT), strict=True)):
                counted = is_object & (labels[..., column] >= 0)
                right[place] += (part.argmax(-1) == labels[..., column])[counted].sum()
                seen[place] += counted.sum()
            marked, truth = center[..., 0] > 0.35, labels[..., CENTER] > 0
            right[4] += 2 * (marked & truth).sum()
            seen[4] += marked.sum() + truth.sum()
        shares = self.total(right) / self.total(seen).clamp(min=1)
        return dict(zip(("kind", "color", "region", "digit", "center_f1"), shares.tolist(), strict=True))

    @torch.no_grad()
    def encode(self, weights: Weights) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        """Run the trained tower once over all images; returns features float16 ``[N, 256, D]`` per split."""
        encoded = []
        counts = {"train": self.recipe.decoder_images, "validation": self.recipe.validation_images}
        for split, drawn in (("train", self.train), ("validation", self.validation)):
            count, path = counts[split], self.out / "cache" / f"{split}-features.npy"
            if self.rank == 0:
                table(path, "float16", (count, TOKENS, self.recipe.hidden_size))
            self.wait()
            features = table(path, "float16", (count, TOKENS, self.recipe.hidden_size))
            done = path.with_suffix(f".{self.rank}-of-{self.world}")
            for start in range(self.rank * 8, 0 if done.exists() else count, 8 * self.world):
                end = min(start + 8, count)
                images = torch.from_numpy(np.asarray(drawn.images[start:end]))
                features[start:end] = tower(weights, self.recipe, images)[0].half().numpy()
            done.touch()
            self.wait()
            encoded.append(features)
        return encoded[0], encoded[1]  # type: ignore[return-value]

    def train_decoder(
        self,
        tower_weights: Weights,
        train: NDArray[np.float16],
        validation: NDArray[np.float16],
        stop: int | None = None,
    ) -> Weights:
        """Train decoder and projector to answer, on the frozen tower's features; resumes from its checkpoint.

        Parameters
        ----------
        tower_weights : dict of torch.Tensor
            What ``train_tower`` returned.
        train, validation : numpy.ndarray
            float16 features ``[N, 256, D]``.
        stop : int, optional
            Leave after this step, as if interrupted.

        Returns
        -------
        dict of torch.Tensor
            float32 weights of projector and decoder.
        """
        stage, path = self.recipe.decoder, self.out / "decoder.safetensors"
        initial = {k: v for k, v in initial_weights(self.recipe).items() if k.startswith(TEXT)}
        initial |= {k: v for k, v in tower_weights.items() if "projector" in k}
        slow = ("embed", "projector", "norm")
        optimizer = FlatAdamW(initial, stage.weight_decay, slow, self.dtype)
        if path.exists():
            optimizer.restore(path)
        for step, chosen in self.batches("decoder", stage, optimizer.step_count, self.recipe.decoder_images):
            if step == stop:
                break
            texts = pack([self._questions("train", int(index), step) for index in chosen])
            loss, right = self._answer_loss(optimizer.weights, train, chosen, texts, step)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step(stage.rate(step))
            if step % 20 == 0:
                self.log(stage="decoder", step=step, loss=round(loss.item(), 4), right=round(right, 4))
            self._checkpoint(optimizer, path, step + 1, stage)
            if (step + 1) % self.recipe.evaluate_every == 0 or step + 1 == stage.steps:
                self.log(stage="decoder", step=step + 1, **self.evaluate_decoder(optimizer.trained(), validation))
        return optimizer.trained()

    def _questions(self, split: str, index: int, step: int | None = None) -> tuple[Question, ...]:
        plan = plan_scene(split, DATA_SEED, index)
        key: tuple[str | int, ...] = (split, DATA_SEED, index, "questions")
        if step is not None:
            key = (*key, self.recipe.seed, step)
        return ask(plan.objects, plan.background, generator(*key))

    def _hidden(self, weights: Weights, features: Tensor, texts: Texts, compression: Tensor) -> tuple[Tensor, Tensor]:
        projected = project(weights, features)
        embeddings = weights[TEXT + "embed_tokens.weight"]
        start = embeddings[BOS_ID].expand(len(features), 1, -1)
        x = torch.cat([start, projected, embeddings[texts.ids]], 1)
        mask = attention_mask(texts).to(x.dtype)
        return projected, decode(weights, self.recipe, x, positions(texts, compression), mask, texts.ids.shape[1])

    def _answer_loss(
        self, weights: Weights, features: NDArray[np.float16], chosen: NDArray[np.int64], texts: Texts, step: int
    ) -> tuple[Tensor, float]:
        rng = generator("compression", self.recipe.seed, step, self.rank)
        compression = np.where(rng.random(len(chosen)) < 0.5, 1.0, rng.uniform(1, LARGEST_COMPRESSION, len(chosen)))
        tokens = torch.from_numpy(np.asarray(features[chosen])).to(self.dtype)
        projected, hidden = self._hidden(weights, tokens, texts, torch.from_numpy(compression).float())
        embeddings = weights[TEXT + "embed_tokens.weight"]
        logits = (hidden[texts.rows, texts.columns] @ embeddings.T).float()
        ends = (hidden[texts.rows, texts.columns + 1] @ embeddings.T).float()
        scale = torch.tensor([self.recipe.kind_weights.get(kind, 1.0) for kind in QUESTION_KINDS])[texts.kinds]
        answer = (F.cross_entropy(logits, texts.answers, reduction="none") * scale).sum() / scale.sum()
        stop = F.cross_entropy(ends, torch.full_like(texts.answers, EOS_ID))
        labels = torch.from_numpy(np.asarray(self.train.labels[chosen])).long()
        aligned = align_loss(projected.float(), self.words, self.places, labels)
        right = (logits.argmax(-1) == texts.answers).float().mean().item()
        return answer + self.recipe.stop_weight * stop + self.recipe.align_weight * aligned, right

    @torch.no_grad()
    def evaluate_decoder(self, weights: Weights, features: NDArray[np.float16], count: int = 240) -> dict[str, float]:
        """Accuracy on validation questions, all together and per kind, all tokens kept."""
        right, seen = torch.zeros(len(QUESTION_KINDS)), torch.zeros(len(QUESTION_KINDS))
        embeddings = weights[TEXT + "embed_tokens.weight"]
        for start in range(self.rank * 8, min(count, len(features)), 8 * self.world):
            numbers = range(start, min(start + 8, len(features)))
            texts = pack([self._questions("validation", index) for index in numbers])
            tokens = torch.from_numpy(np.asarray(features[start : numbers.stop])).float()
            _, hidden = self._hidden(weights, tokens, texts, torch.ones(len(numbers)))
            answers = (hidden[texts.rows, texts.columns] @ embeddings.T).argmax(-1)
            right.index_add_(0, texts.kinds, (answers == texts.answers).float())
            seen.index_add_(0, texts.kinds, torch.ones(len(answers)))
        right, seen = self.total(right), self.total(seen)
        shares = dict(zip(QUESTION_KINDS, (right / seen.clamp(min=1)).tolist(), strict=True))
        return {"all": (right.sum() / seen.sum()).item(), **shares}

    def run(self, stop: tuple[str, int] | None = None) -> None:
        """Draw, train the tower, encode, train the decoder, and write ``final.safetensors``.

        Parameters
        ----------
        stop : tuple of str and int, optional
            Stage and step after which to leave, as if interrupted.
        """
        threads = torch.get_num_threads()
        # Sums over several threads are not repeatable to the last bit, so a resumed run would differ.
        torch.set_num_threads(1)
        try:
            self._run(dict([stop]) if stop else {})
        finally:
            torch.set_num_threads(threads)

    def _run(self, where: dict[str, int]) -> None:
        torch.manual_seed(self.recipe.seed)
        self.draw()
        vision = self.train_tower(where.get("tower"))
        if "tower" in where:
            return
        train, validation = self.encode(vision)
        text = self.train_decoder(vision, train, validation, where.get("decoder"))
        if "decoder" not in where and self.rank == 0:
            kept = {k: v for k, v in {**vision, **text}.items() if not k.startswith("heads.")}
            save_file({k: v.contiguous().clone() for k, v in kept.items()}, self.out / "final.safetensors")
            self.log(stage="done")


def main(out: Path, rank: int, world: int) -> None:
    """Entry point of one of several processes; they meet through a file in ``out``."""
    dist.init_process_group("gloo", init_method=f"file://{out.resolve()}/meeting", rank=rank, world_size=world)
    Worker(Recipe.load(out / "recipe.json"), out, rank, world).run()
    dist.barrier()  # a process that leaves first would break the connection of one that still reads
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
