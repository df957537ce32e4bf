"""Two models that share the work: a small one guides a large one (SGL)."""
