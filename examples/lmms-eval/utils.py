"""Turns scenes with several questions each into one document per question."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from foveate.measure.loading import open_image


def questions(scenes: Dataset) -> Dataset:
    """Return one document per question, with the path of its image."""
    return Dataset.from_list([{"image": scene["image"], **asked} for scene in scenes for asked in scene["questions"]])


def yes_or_no(scenes: Dataset) -> Dataset:
    """Return the questions that are answered by yes or no."""
    return questions(scenes).filter(lambda doc: doc["answer"] in ("yes", "no"))


def image(doc: dict[str, Any]) -> list[Any]:
    """Return the image of a question."""
    return [open_image(doc["image"])]


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return 1 for the right word."""
    return {"accuracy": float(results[0] == doc["answer"])}
