"""Measured time and memory."""
