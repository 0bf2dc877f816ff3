"""Run a training script and write down, in float64, what its clips and optimizers are given.

    python tests/independent_norms.py --to EVENTS SCRIPT ARGUMENTS...

It shares no code and no method with gradscope: the functions of ``torch.nn.utils`` are replaced before the script
imports them, and every gradient is gathered whole on every rank.  Rank r writes ``EVENTS.r``, one JSON object a line:

``clip``   a call that clips: ``function``, ``max_norm``, ``returned`` (the total norm), ``tensors``
``step``   an optimizer that is about to step: ``optimizer``, ``tensors``; ``closure`` where it calls one
``closure``  the gradients that the closure left behind, each time it was called
``stepped``  the optimizer is done; ``changed`` says whether any of its parameters is another than before
``end``    ``fingerprints``: SHA-256 of every parameter's bytes after its last step, by index

``tensors`` lists [parameter index, L2 norm of its gradient or null where it has none], before clipping and with any
loss scale taken out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import runpy
import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO

import torch
import torch.nn.utils.clip_grad as clip_grad
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Witness:
    def __init__(self, out: TextIO) -> None:
        self.out = out
        self.parameters: list[torch.Tensor] = []
        self.index: dict[int, int] = {}
        self.fingerprints: dict[int, str] = {}

    def write(self, event: str, **said: Any) -> None:
        self.out.write(json.dumps({"event": event, **said}) + "\n")

    def number(self, parameter: torch.Tensor) -> int:
        if id(parameter) not in self.index:
            # Kept alive, so that no other tensor gets its id.
            self.parameters.append(parameter)
            self.index[id(parameter)] = len(self.parameters) - 1
        return self.index[id(parameter)]

    def norms(self, parameters: Iterable[torch.Tensor], scale: float = 1.0) -> list[tuple[int, float | None]]:
        return [
            (self.number(p), None if p.grad is None else float(whole(p.grad).double().norm()) / scale)
            for p in parameters
        ]

    def clips(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` as it was, with a line written before each call."""
        name = function.__name__.lstrip("_")

        def witnessed(parameters: Any, limit: float, *args: Any, **options: Any) -> Any:
            given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
            tensors = self.norms(given)
            result = function(given, limit, *args, **options)
            total = args[0] if name == "clip_grads_with_norm_" else result
            returned = None if total is None else float(whole(total))
            self.write("clip", function=name, max_norm=float(limit), returned=returned, tensors=tensors)
            return result

        return witnessed

    def before_step(self, optimizer: torch.optim.Optimizer, args: Any, options: Any) -> Any:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in held:
            self.fingerprints.setdefault(self.number(parameter), fingerprint(parameter))
        scale = getattr(optimizer, "grad_scale", None)
        tensors = self.norms(held, 1.0 if scale is None else float(scale))
        closure = args[1] if len(args) > 1 else options.get("closure")
        self.write("step", optimizer=type(optimizer).__name__, tensors=tensors, closure=closure is not None)
        if closure is None:
            return None

        def witnessed() -> Any:
            loss = closure()
            self.write("closure", tensors=self.norms(held))
            return loss

        if len(args) > 1:
            return (args[0], witnessed, *args[2:]), options
        return args, {**options, "closure": witnessed}

    def after_step(self, optimizer: torch.optim.Optimizer, _args: Any, _options: Any) -> None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        now = {self.number(p): fingerprint(p) for p in held}
        changed = any(self.fingerprints[number] != found for number, found in now.items())
        self.fingerprints.update(now)
        self.write("stepped", optimizer=type(optimizer).__name__, changed=changed)


def fingerprint(parameter: torch.Tensor) -> str:
    return hashlib.sha256(whole(parameter).contiguous().numpy().tobytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--to", required=True)
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    with open(f"{options.to}.{os.environ.get('RANK', '0')}", "w") as out:
        witness = Witness(out)
        for function in (clip_grad.clip_grad_norm_, clip_grad.clip_grad_value_, clip_grad._clip_grads_with_norm_):
            witnessed = witness.clips(function)
            setattr(torch.nn.utils, function.__name__.lstrip("_"), witnessed)
            # clip_grad_norm_ itself calls the private one, which would be a second line for one clip.
            if not function.__name__.startswith("_"):
                setattr(clip_grad, function.__name__, witnessed)
        register_optimizer_step_pre_hook(witness.before_step)
        register_optimizer_step_post_hook(witness.after_step)
        sys.argv = [options.script, *options.arguments]
        runpy.run_path(options.script, run_name="__main__")
        witness.write("end", fingerprints=[witness.fingerprints.get(n) for n in range(len(witness.parameters))])


if __name__ == "__main__":
    main()
