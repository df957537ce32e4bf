"""The bias on attention to kept tokens that says how many each stands for: where it is, and how kernels are given it."""
