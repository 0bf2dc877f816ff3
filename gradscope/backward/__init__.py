"""Gradients of a captured batch: weights and a batch -> gradient steps.  The only analysis that needs torch."""
