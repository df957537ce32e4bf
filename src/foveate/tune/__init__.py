"""Tuning: which method at which budget fulfils a wish on one's own images and questions."""
