"""Engines: what applies selections to a running model."""
