"""The engine for models of `transformers`."""
