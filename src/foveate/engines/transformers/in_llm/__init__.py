"""Methods inside the language model: hooks on its layers, the pass that they serve, and what each layer keeps."""
