"""What everything rests on: tokens, selections, budgets, probes and the base classes of methods. Torch only."""
