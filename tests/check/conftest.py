"""A tiny model to check, and a broken method."""

from __future__ import annotations

import pytest

from faults import broken  # noqa: F401  a fixture
from foveate.check.subjects import load_subject


@pytest.fixture(scope="session")
def subject():
    return load_subject("tiny-llava-1.5-7b", "cpu", "auto", None)
