"""The stored format of a recorded run: ``NAME.gradscope/``."""
