"""Which of a run's processes this is."""

from __future__ import annotations

import os


def rank_and_world() -> tuple[int, int]:
    """The rank of this process and how many train together; (0, 1) for a run of one process."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    world = os.environ.get("WORLD_SIZE", "")
    rank = os.environ.get("RANK", "")
    if world.isdecimal() and rank.isdecimal() and int(rank) < int(world):
        return int(rank), int(world)
    return 0, 1


def common_run() -> str:
    """What the ranks of a distributed run share, and no other run does."""
    named = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")
    return " ".join(os.environ.get(name, "") for name in named)
