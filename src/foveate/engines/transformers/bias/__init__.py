"""The bias on attention to kept tokens, by how many each stands for: where it is, and how kernels are given it."""
