"""Asking a model about images with and without reduction, and measuring both."""
