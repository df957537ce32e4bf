"""Whether foveate is right and fast with a model on a machine."""
