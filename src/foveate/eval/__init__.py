"""Accuracy of reduced models."""
