"""What torch's allocator on the CPU is asked for."""

from collections.abc import Callable

from torch.profiler import profile


def largest_allocation(function: Callable[[], object]) -> int:
    """The bytes of the largest one while `function` runs. Gradients of 4 MB and more are not seen:
    neglog.ops.memory makes them."""
    with profile(profile_memory=True) as recorded:
        function()
    events = recorded.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")
