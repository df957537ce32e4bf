"""What is fitted to a model before it is used: exit gates, codebooks, VFlowOpt's strategy."""
