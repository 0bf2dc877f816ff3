"""How fast gradscope is, against the peers that do the same work: ``python -m benchmarks``."""
