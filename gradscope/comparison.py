"""Two sources side by side -> ``Comparison``."""
