"""Pictures of what a method kept."""

from foveate.viz.overlay import draw, highlight, save

__all__ = ["draw", "highlight", "save"]
