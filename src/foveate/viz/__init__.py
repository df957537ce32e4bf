"""Pictures of what a method kept."""

from foveate.viz.overlay import draw, save

__all__ = ["draw", "save"]
