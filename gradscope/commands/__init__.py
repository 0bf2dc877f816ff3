"""One file per command: parse, call, render; nothing else."""
