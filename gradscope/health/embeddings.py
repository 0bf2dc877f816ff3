"""Which tensors are embeddings: a batch touches few of their rows, and they stand at no depth."""

from __future__ import annotations

import re

_EMBEDDING = re.compile(r"(^|[._])(\w*embed\w*|emb|wte|wpe)([._]|$)", re.IGNORECASE)


def is_embedding(name: str) -> bool:
    """Whether the tensor ``name`` belongs to an embedding, as PyTorch models and Transformers call them."""
    return _EMBEDDING.search(name) is not None
