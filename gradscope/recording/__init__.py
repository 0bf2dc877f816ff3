"""Recording the gradients of a training run that does not know of it."""
