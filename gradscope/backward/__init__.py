"""Gradients of a captured batch: a model's weights and a batch -> gradient steps.  The only analysis that needs torch."""
