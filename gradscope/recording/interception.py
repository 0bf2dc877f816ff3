"""Standing between a training loop and torch's own clipping and stepping, without the loop noticing.

``torch.nn.utils.clip_grad_norm_`` and its kin are closures around their implementation.  The implementation inside is
exchanged, not the name, so that whoever bound the function before (``from torch.nn.utils import clip_grad_norm_``) is
seen as well, and the function stays the same object: it pickles, and ``torch.compile`` traces it.  Where torch.compile
compiles a clip call or an optimizer step, the code runs as torch wrote it and nothing is seen.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from types import FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradscope.recording.watcher import Watcher

# Frames of these modules stand between a clip call and the line of the training code that made it.
_PASSED_OVER = frozenset({"torch.nn.utils.clip_grad", "torch.utils._contextlib", "gradscope.recording.interception"})


_STEPPING = ("torch.optim", "torch.utils._contextlib", "gradscope.recording")


class _Wrapped:
    """One function of torch inside the wrappers of all recorders that are attached, which may leave in any order."""

    def __init__(self, original: Any, put: Callable[[Any], None]) -> None:
        self.layers: list[Callable[[Any], Any]] = []
        self._original = original
        self._put = put

    def add(self, wrap: Callable[[Any], Any]) -> None:
        """Put one more wrapper around the others."""
        self.layers.append(wrap)
        self._put_on()

    def take_off(self, wrap: Callable[[Any], Any]) -> None:
        """Take one away; the others stay."""
        self.layers.remove(wrap)
        self._put_on()

    def _put_on(self) -> None:
        function = self._original
        for wrap in self.layers:
            function = wrap(function)
        self._put(function)


_WRAPPED: dict[Any, _Wrapped] = {}


class Interception:
    """Feeds a ``Watcher``; ``install`` and ``remove`` may each be called once."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._undo: list[Callable[[], None]] = []

    def install(self) -> None:
        """Attach to torch."""
        clip = torch.nn.utils.clip_grad
        for name, wrap in (
            ("clip_grad_norm_", self._clip_grad_norm),
            ("clip_grad_value_", self._clip_grad_value),
            ("_clip_grads_with_norm_", self._clip_grads_with_norm),
        ):
            function = getattr(clip, name, None)
            if function is not None:
                self._exchange(clip, name, function, wrap)
        self._undo.append(register_optimizer_step_pre_hook(self._before_step()).remove)
        self._undo.append(register_optimizer_step_post_hook(self._after_step()).remove)
        scaler = torch.amp.GradScaler if hasattr(torch.amp, "GradScaler") else torch.cuda.amp.GradScaler
        self._replace_method(scaler, "step", self._scaler_step)
        self._replace_method(scaler, "unscale_", self._scaler_unscale)
        fsdp = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
        if fsdp is not None:
            self._intercept_fsdp(fsdp)
        else:
            from wrapt.importer import register_post_import_hook

            register_post_import_hook(self._intercept_fsdp, "torch.distributed.fsdp.fully_sharded_data_parallel")

    def remove(self) -> None:
        """Detach: torch is as it was before ``install``, but for other recorders that are attached."""
        while self._undo:
            self._undo.pop()()

    def _exchange(self, module: Any, name: str, function: Any, wrap: Callable[[Any], Any]) -> None:
        cell = _implementation_cell(function)
        if cell is not None:
            self._wrap(id(cell), cell.cell_contents, functools.partial(setattr, cell, "cell_contents"), wrap)
            return
        # A torch whose function is no closure: every module that bound its name is told of the replacement.
        for bound in list(sys.modules.values()):
            for bound_name, value in list(getattr(bound, "__dict__", {}).items()):
                if value is function:
                    self._wrap((id(bound), bound_name), function, functools.partial(setattr, bound, bound_name), wrap)

    def _replace_method(self, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        self._wrap((id(owner), name), getattr(owner, name), functools.partial(setattr, owner, name), wrap)

    def _wrap(self, place: Any, current: Any, put: Callable[[Any], None], wrap: Callable[[Any], Any]) -> None:
        wrapped = _WRAPPED.setdefault(place, _Wrapped(current, put))
        wrapped.add(wrap)

        def undo() -> None:
            wrapped.take_off(wrap)
            if not wrapped.layers:
                del _WRAPPED[place]

        self._undo.append(undo)

    def _clip_grad_norm(self, original: Any) -> Any:
        watcher, steady = self._watcher, self._watcher.steady

        @functools.wraps(original)
        def clip_grad_norm_(parameters: Any, max_norm: Any, norm_type: Any = 2.0, *rest: Any, **options: Any) -> Any:
            if is_dynamo_compiling():
                return original(parameters, max_norm, norm_type, *rest, **options)
            if steady.on:
                seen, found = steady.clip(original, parameters, max_norm, norm_type, rest, options)
                if seen:
                    return found
                parameters = found
            if is_compiling() or not watcher.watching():
                return original(parameters, max_norm, norm_type, *rest, **options)
            listed = _as_list(parameters)
            # An empty generator stays one: torch warns of it.
            handed = listed if listed or isinstance(parameters, list) else parameters
            clip = functools.partial(original, handed, max_norm, norm_type, *rest, **options)
            return self._watched(clip, "clip_grad_norm_", listed, max_norm, norm_type)

        return clip_grad_norm_

    def _clip_grads_with_norm(self, original: Any) -> Any:
        watcher, steady = self._watcher, self._watcher.steady

        @functools.wraps(original)
        def clip_grads_with_norm_(parameters: Any, max_norm: Any, total_norm: Any, *rest: Any, **options: Any) -> Any:
            if is_dynamo_compiling() or steady.inside() or is_compiling() or not watcher.watching():
                return original(parameters, max_norm, total_norm, *rest, **options)
            listed = _as_list(parameters)
            clip = functools.partial(original, listed, max_norm, total_norm, *rest, **options)
            return self._watched(clip, "clip_grads_with_norm_", listed, max_norm, 2.0, total_norm)

        return clip_grads_with_norm_

    def _clip_grad_value(self, original: Any) -> Any:
        watcher = self._watcher

        @functools.wraps(original)
        def clip_grad_value_(parameters: Any, clip_value: Any, *rest: Any, **options: Any) -> Any:
            if is_compiling() or not watcher.watching():
                return original(parameters, clip_value, *rest, **options)
            listed = _as_list(parameters)
            clip = functools.partial(original, listed, clip_value, *rest, **options)
            return self._watched(clip, "clip_grad_value_", listed, None, None, None, clip_value)

        return clip_grad_value_

    def _watched(self, clip: Callable[[], Any], function: str, parameters: list[Tensor], *limits: Any) -> Any:
        """Run ``clip`` between the two looks at what it does; ``limits`` are those of ``Watcher.before_clip``."""
        watcher = self._watcher
        call = None
        try:
            watcher.leave_steady()
            call = watcher.before_clip(function, parameters, _caller(), *limits)
        except Exception as error:  # noqa: BLE001 - see Watcher.broke
            watcher.broke(error)
        with watcher.nested():
            returned = clip()
        if call is not None:
            try:
                watcher.after_clip(call, returned)
            except Exception as error:  # noqa: BLE001 - see Watcher.broke
                watcher.broke(error)
        return returned

    def _before_step(self) -> Any:
        watcher, steady = self._watcher, self._watcher.steady

        def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
            if is_dynamo_compiling():
                return None
            try:
                if steady.before_step(optimizer, args, kwargs):
                    return None
                if is_compiling() or not watcher.stepping():
                    return None
                watcher.leave_steady()
                closure = kwargs.get("closure") or (args[1] if len(args) > 1 and callable(args[1]) else None)
                if closure is None:
                    watcher.before_step(optimizer, _stepping_frame)
                    return None
                # The gradient exists inside the closure only; its first evaluation is at the point stepped from.
                seen = watcher.closure(optimizer, closure, _stepping_frame)
            except Exception as error:  # noqa: BLE001 - see Watcher.broke
                watcher.broke(error)
                return None
            if "closure" in kwargs:
                return args, {**kwargs, "closure": seen}
            return (args[0], seen, *args[2:]), kwargs

        return before_step

    def _after_step(self) -> Any:
        watcher, steady = self._watcher, self._watcher.steady

        def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if is_dynamo_compiling():
                return
            try:
                if steady.after_step():
                    return
                if is_compiling() or not watcher.stepping():
                    return
                watcher.after_step(optimizer)
            except Exception as error:  # noqa: BLE001 - see Watcher.broke
                watcher.broke(error)
            if watcher.fault is not None:
                raise FloatingPointError(watcher.fault)

        return after_step

    def _scaler_step(self, original: Any) -> Any:
        watcher = self._watcher

        @functools.wraps(original)
        def step(scaler: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            if not watcher.stepping() or not scaler.is_enabled():
                return original(scaler, optimizer, *args, **kwargs)
            finished = None
            try:
                finished = watcher.finished(optimizer)
            except Exception as error:  # noqa: BLE001 - see Watcher.broke
                watcher.broke(error)
            stepped = original(scaler, optimizer, *args, **kwargs)
            try:
                if finished is not None:
                    watcher.after_scaled_step(optimizer, finished)
            except Exception as error:  # noqa: BLE001 - see Watcher.broke
                watcher.broke(error)
            return stepped

        return step

    def _scaler_unscale(self, original: Any) -> Any:
        watcher = self._watcher

        @functools.wraps(original)
        def unscale_(scaler: Any, optimizer: Any) -> Any:
            if watcher.stepping() and scaler.is_enabled():
                try:
                    watcher.before_unscale(optimizer, scaler)
                except Exception as error:  # noqa: BLE001 - see Watcher.broke
                    watcher.broke(error)
            return original(scaler, optimizer)

        return unscale_

    def _intercept_fsdp(self, module: Any) -> None:
        watcher = self._watcher

        def wrap(original: Any) -> Any:
            @functools.wraps(original)
            def clip_grad_norm_(fsdp: Any, max_norm: Any, norm_type: Any = 2.0) -> Any:
                # With nothing sharded it is torch.nn.utils.clip_grad_norm_ that clips, and is seen.
                if not watcher.watching() or not any(handle.uses_sharded_strategy for handle in fsdp._all_handles):
                    return original(fsdp, max_norm, norm_type)
                parameters = [p for p in fsdp.parameters() if p.requires_grad]
                clip = functools.partial(original, fsdp, max_norm, norm_type)
                return self._watched(clip, "FSDP.clip_grad_norm_", parameters, max_norm, norm_type)

            return clip_grad_norm_

        self._replace_method(module.FullyShardedDataParallel, "clip_grad_norm_", wrap)


def _implementation_cell(function: Any) -> Any:
    """The closure cell that holds what ``function`` wraps; None where it wraps nothing."""
    if not isinstance(function, FunctionType) or not function.__closure__:
        return None
    cells = [cell for cell in function.__closure__ if callable(cell.cell_contents)]
    return cells[0] if len(cells) == 1 else None


def _as_list(parameters: Any) -> list[Tensor]:
    if isinstance(parameters, Tensor):
        return [parameters]
    if isinstance(parameters, list):
        return parameters
    return list(parameters) if isinstance(parameters, Iterable) else []


def _caller() -> FrameType | None:
    """The line of the training code that called the clip function."""
    frame: FrameType | None = sys._getframe(3)
    while frame is not None and frame.f_globals.get("__name__") in _PASSED_OVER:
        frame = frame.f_back
    return frame


def _stepping_frame() -> FrameType | None:
    """The line of the training code that called ``optimizer.step``."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_STEPPING):
        frame = frame.f_back
    return frame
