"""An op from one declaration: its schema, implementations, shapes, derivative, and forms.

    forward = Op("nll(Tensor logits, Tensor target, ...) -> (Tensor loss, Tensor lse, ...)")
    forward.implement("cpu", function)      # function(arguments) -> results
    forward.shapes(function)                # the same for tensors that have no memory
    forward.differentiable(setup, backward)

Each function takes one named tuple whose fields are the schema's arguments, and `backward` one of
gradients whose fields are the schema's results; it returns a dict of gradients by argument.

An op has three forms. The registered one, torch.ops.neglog.nll, is what torch.compile and export
see. torch.func demands the functional one, an autograd.Function with setup_context. Eager calls
take the third, a Function that calls the implementation past torch's dispatcher, which costs 100
microseconds where an op has thirty arguments.

A float of a registered op is a constant of the graph: one that changes compiles it anew. So the
floats that `numbers` lists may be tensors () instead. The op is then `<name>_numbers`, which takes
them as one tensor on the CPU and reads it when it runs.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from neglog import torch_state

library = torch.library.Library("neglog", "DEF")


class Op:
    """One op of the namespace neglog. Called, it takes the form that fits what is active."""

    def __init__(self, schema: str, compiled: bool = True, numbers: str = "") -> None:
        """compiled: torch.compile and export may trace the op. numbers: the part of the schema with
        the floats that may be tensors."""
        self.schema = schema
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,) if compiled else ())
        self.name = schema.partition("(")[0]
        self.registered = getattr(torch.ops.neglog, self.name).default
        described = self.registered._schema
        names = [argument.name for argument in described.arguments]
        self.Arguments: Any = namedtuple("Arguments", names)  # type: ignore[misc]
        results = [result.name or "result" for result in described.returns]
        self.Results: Any = namedtuple("Results", results)  # type: ignore[misc]
        # Whose device decides which implementation runs.
        self._decisive = next(
            (i for i, x in enumerate(described.arguments) if str(x.type) == "Tensor"), 0
        )
        # What may be a batch of gradients, as with is_grads_batched=True.
        self._gradients = [i for i, name in enumerate(names) if name.startswith("grad")]
        self._numbers = slice(0)
        self._of_numbers: Op | None = None
        if numbers:
            self._of_numbers = self._with_tensor_for(numbers)
        self._implementations: dict[str, Callable[[Any], Any]] = {}
        self._functional: Any = None
        self._eager: Any = None

    def _with_tensor_for(self, numbers: str) -> Op:
        """The op that takes these floats as one tensor."""
        schema = self.schema.replace(numbers, "Tensor numbers")
        made = Op(schema.replace(self.name, f"{self.name}_numbers", 1))
        first = made.Arguments._fields.index("numbers")
        self._numbers = slice(first, first + numbers.count(",") + 1)

        def by_floats(*given: Any) -> Any:
            a = made.Arguments(*given)
            return self.registered(*self._spread(a, a.numbers.tolist()))

        library.impl(made.name, by_floats, "CompositeExplicitAutograd")
        return made

    def _spread(self, a: Any, numbers: Sequence[Any]) -> Any:
        """The arguments of this op from those of the other."""
        first = self._numbers.start
        return self.Arguments(*a[:first], *numbers, *a[first + 1 :])

    def __call__(self, *arguments: Any) -> Any:
        """The results, by name where there are several."""
        numbers = arguments[self._numbers]
        if numbers and isinstance(numbers[0], Tensor):
            first, end = self._numbers.start, self._numbers.stop
            assert self._of_numbers is not None
            return self._of_numbers(*arguments[:first], torch.stack(numbers), *arguments[end:])
        if torch_state.transforming() and not torch_state.compiling() and self._functional:
            return self._named(self._functional.apply(*arguments))
        decisive = arguments[self._decisive]
        function = self._implementations.get(decisive.device.type)
        batched = any(torch_state.batched(arguments[i]) for i in self._gradients)
        if function is None or torch_state.traced(decisive) or batched:
            return self._named(self.registered(*arguments))
        if self._eager is None or not torch.is_grad_enabled():
            return self._named(function(self.Arguments(*arguments)))
        return self._named(self._eager.apply(*arguments))

    def _named(self, output: Any) -> Any:
        return self.Results(*output) if len(self.Results._fields) > 1 else output

    def _all_results(self, output: Any) -> Any:
        return self.Results(*output) if isinstance(output, tuple | list) else self.Results(output)

    def implement(self, device: str, function: Callable[[Any], Any]) -> None:
        """`function` computes the op for tensors on this device, "cpu" or "cuda"."""
        self._implementations[device] = function
        library.impl(self.name, lambda *given: function(self.Arguments(*given)), device.upper())

    def implemented_by_library(self, device: str) -> None:
        """A compiled library registers the op for tensors on this device. Eager calls go past the
        functions that `differentiable` registers, and save 40 microseconds of the host in a forward
        and backward."""

        def function(arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return self.registered(*arguments)

        self._implementations[device] = function

    def shapes(self, function: Callable[[Any], Any]) -> None:
        torch.library.register_fake(
            f"neglog::{self.name}", lambda *given: function(self.Arguments(*given)), lib=library
        )
        if self._of_numbers is not None:
            self._of_numbers.shapes(lambda a: function(self._spread(a, a.numbers.unbind())))

    def differentiable(
        self, setup: Callable[[Any, Any, Any], None], backward: Callable[[Any, Any], dict[str, Any]]
    ) -> None:
        """setup(ctx, arguments, results) saves; backward(ctx, gradients) is their derivative.

        backward is not called where no gradient arrives. A gradient of None means zero.
        """
        if self._of_numbers is not None:
            self._of_numbers.differentiable(
                lambda ctx, a, results: setup(ctx, self._spread(a, a.numbers.unbind()), results),
                backward,
            )
        count = len(self.Arguments._fields)

        def set_up(ctx: Any, inputs: tuple, output: Any) -> None:
            ctx.set_materialize_grads(False)
            setup(ctx, self.Arguments(*inputs), self._all_results(output))

        def by_position(ctx: Any, *gradients: Any) -> tuple:
            if all(gradient is None for gradient in gradients):
                return (None,) * count
            ctx.wanted = self.Arguments(*ctx.needs_input_grad[:count])
            found = backward(ctx, self.Results(*gradients))
            return tuple(found.get(name) for name in self.Arguments._fields)

        torch.library.register_autograd(
            f"neglog::{self.name}", by_position, setup_context=set_up, lib=library
        )
        members = {
            "forward": staticmethod(lambda *inputs: self.registered(*inputs)),
            "setup_context": staticmethod(set_up),
            "backward": staticmethod(by_position),
        }
        self._functional = type(f"Functional_{self.name}", (Function,), members)
        self._functional.vmap = staticmethod(_vmap_by_loop(self._functional))

        def forward(ctx: Any, *inputs: Any) -> Any:
            function = self._implementations[inputs[self._decisive].device.type]
            output = function(self.Arguments(*inputs))
            set_up(ctx, inputs, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(by_position)}
        self._eager = type(f"Eager_{self.name}", (Function,), members)


def save(ctx: Any, **tensors: Tensor | None) -> None:
    """Keep tensors for the backward by name."""
    ctx.saved_names = tuple(tensors)
    ctx.save_for_backward(*tensors.values())


def saved(ctx: Any) -> dict[str, Any]:
    return dict(zip(ctx.saved_names, ctx.saved_tensors, strict=True))


def _vmap_by_loop(function: Any) -> Any:
    """vmap as the loop it stands for; one call of a kernel already fills the machine.

    Of a batch of 0 one call of zeros, the sums over it, says which shapes there are none of.
    """

    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> Any:
        def sample(value: Any, dim: Any, index: int) -> Any:
            if not isinstance(dim, int):  # a list's dim is a list
                return value
            return (
                value.select(dim, index) if info.batch_size else value.sum(dim, dtype=value.dtype)
            )

        calls = [
            function.apply(*(sample(x, dim, index) for x, dim in zip(inputs, in_dims, strict=True)))
            for index in range(max(1, info.batch_size))
        ]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls)[: info.batch_size], 0
        stacked = tuple(
            torch.stack(outputs)[: info.batch_size] for outputs in zip(*calls, strict=True)
        )
        return stacked, (0,) * len(stacked)

    return vmap


def second_derivative(
    forward: Callable[..., tuple[Tensor, ...]],
    upstream: Mapping[str, Tensor | None],
    inputs: dict[str, Tensor],
    gradients: dict[str, Tensor | None],
) -> dict[str, Tensor]:
    """Derivative of forward's own gradient, by upstream and by input.

    upstream: the gradients of forward's results, in their order; None means zero. inputs: what
    `forward` takes, in its order. gradients: what arrives for the gradient of each input; None, or
    an empty tensor, means zero.
    """
    given = {name: grad for name, grad in upstream.items() if grad is not None}
    used = [name for name, grad in gradients.items() if grad is not None and grad.numel()]
    if not used:
        return {}

    def gradient(*values: Tensor) -> tuple[Tensor, ...]:
        outputs, pull, *_ = torch.func.vjp(forward, *values[len(given) :])
        flowing = dict(zip(given, values, strict=False))
        made = pull(
            tuple(
                flowing.get(name, torch.zeros_like(output))
                for name, output in zip(upstream, outputs, strict=True)
            )
        )
        by_name = dict(zip(inputs, made, strict=True))
        return tuple(by_name[name] for name in used)

    pullback = torch.func.vjp(gradient, *given.values(), *inputs.values())[1]
    second = pullback(tuple(gradients[name] for name in used))
    return dict(zip([*given, *inputs], second, strict=True))
