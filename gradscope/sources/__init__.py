"""Where gradients, weights and optimizer states are read from: one file per format."""

from gradscope.sources.opening import open_source

__all__ = ["open_source"]
