"""Data-parallel modules inside a step of many forwards: silent in each, reduced once at its end.

DistributedDataParallel reduces in the backward of each forward, and expects that backward to reach
every parameter. A step of many forwards, of which one reaches one tower, or of a parameter that the
loss alone uses, is no such backward. So all run under no_sync, and then the module's own reducer is
given one backward that reaches every parameter and adds nothing: its buckets, hooks and options are
torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, distributed
from torch.autograd.function import Function
from torch.nn import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel

# Of modules of a static graph whose first iteration was _count_once: the parameters that nobody
# uses, None until that is known.
_unused: WeakKeyDictionary[Any, list[Tensor] | None] = WeakKeyDictionary()


class Wrappers:
    """The data-parallel modules that were called while they were watched, in their order."""

    def __init__(self, forwards: list[int]) -> None:
        """forwards: what each process says of how many it runs, compared where they must agree."""
        self.forwards = forwards
        self.replicated: list[Any] = []  # DistributedDataParallel
        self.learning: set[Any] = set()  # those of them that were called with gradients
        self.sharded: dict[Any, list[int]] = {}  # FSDPModules, and the forwards that called each
        self._number = 0
        self._learned: set[int] = set()
        self._compared = False

    def watch(self, forward: Callable[[], Tensor]) -> Tensor:
        """The next forward of the step; notes the modules that it calls."""
        with _calls_told(self._note):
            made = forward()
        self._number += 1
        return made

    def _note(self, module: Any) -> None:
        if isinstance(module, DistributedDataParallel) and module not in self.replicated:
            _check(module)
            self.replicated.append(module)
        elif isinstance(module, SyncBatchNorm) and module.training and not self._compared:
            self._compared = True
            _compare(self.forwards, module)
        elif not isinstance(module, DistributedDataParallel | SyncBatchNorm):
            self.sharded.setdefault(module, []).append(self._number)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """No DistributedDataParallel that was watched reduces."""

        def note(module: Any) -> None:
            if torch.is_grad_enabled():
                self.learning.add(module)

        with ExitStack() as stack:
            for module in self.replicated:
                if module.static_graph and module not in _unused:
                    _count_once(module)
                stack.enter_context(module.no_sync())
            stack.enter_context(_calls_told(note))
            yield

    @contextmanager
    def forward(self, number: int | None = None) -> Iterator[None]:
        """FSDPModules reduce in their last forward of the step alone, by its number; or in this."""
        for module, numbers in self.sharded.items():
            module.set_requires_gradient_sync(number in (None, numbers[-1]), recurse=False)
        try:
            yield
        finally:
            for module in self.sharded:
                module.set_requires_gradient_sync(True, recurse=False)

    def learned(self, number: int) -> None:
        """The forward of that number had a backward."""
        self._learned.add(number)

    def waiting(self) -> set[int]:
        """Forwards whose backward must come once more for FSDPModules to reduce: the last one of
        each that called it had none, as that of a frozen tower."""
        learned = [
            [number for number in numbers if number in self._learned]
            for numbers in self.sharded.values()
            if numbers[-1] not in self._learned
        ]
        return {numbers[-1] for numbers in learned if numbers}

    def reduce(self) -> None:
        """What silent forwards have left in .grad becomes its mean over processes."""
        for module in self.replicated:
            # Not where the caller gathers over steps, nor of a teacher, called without gradients.
            if not module.require_backward_grad_sync or module not in self.learning:
                continue
            if module.static_graph and _unused[module] is None:
                _unused[module] = _unused_by_all(module)
            _reduce(module)
            for parameter in _unused.get(module) or ():
                parameter.grad = None


_listener: ContextVar[Callable[[Any], None] | None] = ContextVar("neglog_listener", default=None)
_lock, _listening = Lock(), 0


@contextmanager
def _calls_told(listener: Callable[[Any], None]) -> Iterator[None]:
    """`listener` is told of each call of a module that waits for other processes.

    Not by a hook for all modules, which torch.compile would trace into each.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    kinds: tuple[Any, ...] = (DistributedDataParallel, SyncBatchNorm, FSDPModule)
    token = _listener.set(listener)
    _listen(kinds, 1)
    try:
        yield
    finally:
        _listen(kinds, -1)
        _listener.reset(token)


def _listen(kinds: tuple[Any, ...], more: int) -> None:
    """Their calls are told while any thread listens."""
    global _listening
    with _lock:
        _listening += more
        for kind in kinds:
            if _listening == more == 1:
                kind.__call__ = _told_call(kind)
            elif _listening == 0:
                del kind.__call__


def _told_call(kind: Any) -> Any:
    def call(module: Any, *arguments: Any, **options: Any) -> Any:
        listener = _listener.get()
        if listener is not None:
            listener(module)
        return super(kind, module).__call__(*arguments, **options)

    return call


def _check(module: Any) -> None:
    name = "encode: expected a DistributedDataParallel"
    if module._join_config.enable:
        raise RuntimeError(f"{name} outside Join, got one that joins uneven inputs")
    if module.mixed_precision is not None:
        raise RuntimeError(f"{name} without mixed_precision, got one; use torch.autocast")
    if module._delay_all_reduce_params:
        raise RuntimeError(f"{name} without delay_all_reduce_named_params, got some")


def _compare(forwards: list[int], module: SyncBatchNorm) -> None:
    """SyncBatchNorm waits for all processes in each forward: of unlike numbers one never ends."""
    group = module.process_group
    parameters = (x for x in (module.running_mean, module.weight) if x is not None)
    device = next((x.device for x in parameters), torch.device("cpu"))
    mine = torch.tensor(forwards, device=device)
    least = torch.cat([mine, -mine])
    distributed.all_reduce(least, distributed.ReduceOp.MIN, group=group)
    low, high = least.tolist()[: len(forwards)], (-least).tolist()[len(forwards) :]
    if low != high:
        raise RuntimeError(
            "inputs: expected one number of chunks in all processes, as SyncBatchNorm waits for "
            f"them in each, got {low} to {high}"
        )


def _count_once(module: Any) -> None:
    """The first iteration of a static graph, in which the reducer counts how often each parameter
    gets a gradient: it would count those of no_sync too, and wait for as many in each step. What it
    finds without one it leaves alone for ever."""
    if module._static_graph_delay_allreduce_enqueued:
        raise RuntimeError(
            "encode: expected a DistributedDataParallel with static_graph whose first step is that "
            "of cached_step, got one that has made a step: its graph is another"
        )
    without = [x for x in _floating(module) if x.grad is None]
    synchronises, module.require_backward_grad_sync = module.require_backward_grad_sync, True
    try:
        for x in without:
            x.grad = torch.zeros_like(x)
        _reduce(module)
    finally:
        module.require_backward_grad_sync = synchronises
        for x in without:
            x.grad = None
    _unused[module] = None


def _unused_by_all(module: Any) -> list[Tensor]:
    """The parameters that have no gradient in any process."""
    parameters = _floating(module)
    has = torch.tensor([x.grad is not None for x in parameters], device=parameters[0].device).int()
    distributed.all_reduce(has, distributed.ReduceOp.MAX, group=module.process_group)
    return [x for x, used in zip(parameters, has.tolist(), strict=True) if not used]


def _floating(module: Any) -> list[Tensor]:
    return [x for x in module._module_parameters if x.is_floating_point()]


def _reduce(module: Any) -> None:
    """One reduction of a DistributedDataParallel, of the gradients that its parameters have."""
    parameters = _floating(module)
    # It waits for all that learned when it was made, those frozen since too.
    frozen = [(x, x.grad) for x in parameters if not x.requires_grad]
    if len(frozen) == len(parameters):
        return
    reached = parameters
    if module.find_unused_parameters and not module.static_graph:
        # One in any case: processes that have gradients wait for those that have none.
        reached = [x for x in parameters if x.grad is not None] or parameters[:1]
    inner = module.module
    try:
        for x, _ in frozen:
            x.requires_grad_(True).grad = None
        module.module = _Reached(reached)
        with torch.enable_grad():
            # Not by a call of the module, whose hooks have seen every forward.
            module.forward(None).backward()
    finally:
        module.module = inner
        for x, grad in frozen:
            x.requires_grad_(False).grad = grad
    module._check_reducer_finalized()


class _Reached(torch.nn.Module):
    """In the place of a module: its backward reaches these parameters and adds nothing."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__()
        self.reached = tuple(parameters)

    def forward(self, _: Any) -> Tensor:
        number = self.reached[0].new_zeros(())
        for parameter in self.reached:  # the last first, in the order that buckets are made for
            number = _Reach.apply(number, parameter)
        return number


class _Reach(Function):
    """A number, made of a parameter too, whose gradient is none. DistributedDataParallel waits at a
    parameter for a gradient to have arrived, and takes what lies in .grad."""

    @staticmethod
    def forward(ctx: Any, number: Tensor, parameter: Tensor) -> Tensor:
        return number.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None
