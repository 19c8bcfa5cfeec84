"""Vocabulary-parallel losses beside one process with all classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import neglog
from neglog import dispatch
from neglog.distributed.vocab_rows import shard_of
from tests.support import ranks
from tests.support.backends import BEST

ROWS, VOCAB, WIDTH = 9, 11, 5  # 11 classes over 4 processes: 3, 3, 3, 2
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


TARGET = torch.tensor([0, 3, -100, 6, 10, 2, 9, -100, 5])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "ignores another": {"ignore_index": 3, "target": TARGET.abs() % VOCAB},
    "weight": {"weight": normal(VOCAB, seed=3).abs()},
    "smoothed": {"label_smoothing": 0.2},
    "smoothed, weight": {"label_smoothing": 0.3, "weight": normal(VOCAB, seed=3).abs()},
    "smoothed, softcap": {"label_smoothing": 0.3, "softcap": 2.0, "logit_scale": 1.3},
    "softcap": {"softcap": 1.5},
    "scale": {"logit_scale": -0.7},
    "scale learned": {"logit_scale": torch.tensor(1.7, dtype=torch.float64)},
    "z_loss": {"z_loss": 0.1, "weight": normal(VOCAB, seed=4).abs()},
    "num_items": {"num_items": 4},
    "items in a tensor": {"num_items": torch.tensor(4)},
    "loss in double": {"loss_dtype": torch.float64},
    "all": {
        "label_smoothing": 0.1, "softcap": 3.0, "logit_scale": 1.1, "z_loss": 0.01,
        "weight": normal(VOCAB, seed=5).abs(), "reduction": "sum",
    },
}  # fmt: skip


def cut(x: Tensor, axis: int, rank: int, world: int) -> Tensor:
    own = shard_of(x.shape[axis], rank, world)
    return x.narrow(axis, own.start, own.stop - own.start)


def numbers_like(x: Tensor) -> Tensor:
    """1, 2, ..., so that each row's upstream is another."""
    return torch.arange(1.0, x.numel() + 1, dtype=x.dtype).view(x.shape)


def gradients(
    function: Callable[..., Any], learned: dict[str, Tensor], options: dict[str, Any]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What a call gives, and the gradients of its loss and, where there are statistics, of its
    log-sum-exps."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in learned.items()}
    scale = options.get("logit_scale")
    if isinstance(scale, Tensor):
        leaves["logit_scale"] = scale.to(next(iter(leaves.values())).dtype).requires_grad_()
    result = function(**{**options, **leaves})
    results = [result] if isinstance(result, Tensor) else list(result)
    total = (results[0] * numbers_like(results[0])).sum()
    if len(results) > 1 and results[1].requires_grad:
        total = total + (results[1] * numbers_like(results[1]).cos()).sum()
    found = torch.autograd.grad(total, list(leaves.values()))
    return [x.detach() for x in results], dict(zip(leaves, found, strict=True))


def near(found: Tensor, expected: Tensor, what: str, dtype: torch.dtype | None = None) -> None:
    assert found.shape == expected.shape, f"{what}: {found.shape} for {expected.shape}"
    if not found.dtype.is_floating_point:
        assert torch.equal(found, expected), what
        return
    tolerance = TOLERANCE[torch.promote_types(dtype or found.dtype, torch.float32)]
    torch.testing.assert_close(
        found,
        expected.to(found.dtype),
        rtol=tolerance,
        atol=tolerance,
        msg=lambda m: f"{what}: {m}",
    )


def of_dtype(options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: x.to(dtype) if isinstance(x, Tensor) and name == "weight" else x
        for name, x in options.items()
    }


def logits(
    options: dict[str, Any], stats: bool, dtype: torch.dtype, backend: str, rank: int, world: int
) -> None:
    options = {"target": TARGET, **of_dtype(options, dtype), "return_stats": stats}
    x = normal(ROWS, VOCAB, dtype=dtype) * 3
    expected, whole = gradients(neglog.cross_entropy, {"input": x}, options)
    with dispatch.record() as ran:
        found, own = gradients(
            neglog.vocab_parallel_cross_entropy, {"input": cut(x, 1, rank, world)},
            {**options, "vocab_size": VOCAB, "backend": backend},
        )  # fmt: skip
    empty = not cut(x, 1, rank, world).numel()
    assert empty or any(name.endswith(f":{backend}") for name in ran), ran
    for name, one, other in zip(RESULTS, found, expected, strict=False):
        near(one, other, name, dtype)
    near(own["input"], cut(whole["input"], 1, rank, world), "gradient")
    if "logit_scale" in own:
        near(own["logit_scale"], whole["logit_scale"], "logit_scale")


RESULTS = ("loss", "logsumexp", "correct", "entropy")


def head(
    options: dict[str, Any], stats: bool, dtype: torch.dtype, backend: str, rank: int, world: int
) -> None:
    options = {"target": TARGET, **of_dtype(options, dtype), "return_stats": stats}
    hidden, weight = normal(ROWS, WIDTH, dtype=dtype), normal(VOCAB, WIDTH, seed=1, dtype=dtype)
    learned = {
        "input": hidden, "linear_weight": weight, "linear_bias": normal(VOCAB, seed=2, dtype=dtype),
    }  # fmt: skip
    if options.get("shift"):
        learned["input"], options["target"] = hidden.view(3, 3, WIDTH), TARGET.view(3, 3)
    expected, whole = gradients(neglog.linear_cross_entropy, learned, options)
    sharded = {
        name: x if name == "input" else cut(x, 0, rank, world) for name, x in learned.items()
    }
    found, own = gradients(
        neglog.vocab_parallel_linear_cross_entropy, sharded,
        {**options, "vocab_size": VOCAB, "backend": backend},
    )  # fmt: skip
    for name, one, other in zip(RESULTS, found, expected, strict=False):
        near(one, other, name, dtype)
    for name, grad in own.items():
        part = name in ("linear_weight", "linear_bias")
        near(grad, cut(whole[name], 0, rank, world) if part else whole[name], name)


def probabilities(options: dict[str, Any], backend: str, rank: int, world: int) -> None:
    x, q = normal(ROWS, VOCAB) * 3, normal(ROWS, VOCAB, seed=6).softmax(1)
    expected, whole = gradients(neglog.cross_entropy, {"input": x, "target": q}, options)
    sharded = {name: cut(part, 1, rank, world) for name, part in (("input", x), ("target", q))}
    found, own = gradients(
        neglog.vocab_parallel_cross_entropy, sharded,
        {**options, "vocab_size": VOCAB, "backend": backend},
    )  # fmt: skip
    near(found[0], expected[0], "loss")
    for name, grad in own.items():
        near(grad, cut(whole[name], 1, rank, world), name)


def shapes(rank: int, world: int) -> None:
    """(C) and (N, C, d1, d2); heads of more dimensions, probabilities and a mask beside a head."""
    x, t = (
        normal(3, VOCAB, 2, 2),
        torch.tensor([[[1, 2], [0, 6]], [[-100, 3], [4, 4]], [[5, 9], [10, 8]]]),
    )
    options = {"vocab_size": VOCAB}
    for input, target, axis in ((x, t, 1), (normal(VOCAB), torch.tensor(4), 0)):
        for reduction in ("mean", "none"):
            given = {"target": target, "reduction": reduction}
            expected, whole = gradients(neglog.cross_entropy, {"input": input}, given)
            found, own = gradients(
                neglog.vocab_parallel_cross_entropy, {"input": cut(input, axis, rank, world)},
                {**given, **options},
            )  # fmt: skip
            near(found[0], expected[0], "loss")
            near(own["input"], cut(whole["input"], axis, rank, world), "gradient")
    hidden, weight = normal(6, WIDTH), normal(VOCAB, 2, WIDTH, seed=1)
    target = torch.arange(12).view(6, 2) % VOCAB
    both = partial(of_a_head, hidden, weight, rank, world)
    both({"target": target})
    q = normal(6, VOCAB, seed=2).softmax(1)
    mask = torch.tensor([True, False, True, True, False, True])
    of_a_head(hidden, weight[:, 0], rank, world, {"target": q}, sharded=("target",))
    for reduction in ("mean", "none"):
        given = {"target": q, "mask": mask, "reduction": reduction}
        of_a_head(hidden, weight[:, 0], rank, world, given, sharded=("target",))


def of_a_head(
    hidden: Tensor, weight: Tensor, rank: int, world: int, options: dict[str, Any],
    sharded: tuple[str, ...] = (),
) -> None:  # fmt: skip
    learned = {"input": hidden, "linear_weight": weight}
    expected, whole = gradients(neglog.linear_cross_entropy, learned, options)
    own_options = {
        name: cut(x, 1, rank, world) if name in sharded else x for name, x in options.items()
    }
    found, own = gradients(
        neglog.vocab_parallel_linear_cross_entropy,
        {"input": hidden, "linear_weight": cut(weight, 0, rank, world)},
        {**own_options, "vocab_size": VOCAB},
    )  # fmt: skip
    near(found[0], expected[0], "loss")
    near(own["input"], whole["input"], "hidden")
    near(own["linear_weight"], cut(whole["linear_weight"], 0, rank, world), "weight")


def few_classes(rank: int, world: int) -> None:
    """A process without any: 5 classes over 4 are 2, 2, 1, 0."""
    x, target = normal(4, 5), torch.tensor([4, 0, 3, 2])
    for options in ({}, {"label_smoothing": 0.1}, {"return_stats": True}):
        given = {**options, "target": target}
        expected, whole = gradients(neglog.cross_entropy, {"input": x}, given)
        found, own = gradients(
            neglog.vocab_parallel_cross_entropy, {"input": cut(x, 1, rank, world)},
            {**given, "vocab_size": 5},
        )  # fmt: skip
        for one, other in zip(found, expected, strict=True):
            near(one, other, "result")
        near(own["input"], cut(whole["input"], 1, rank, world), "gradient")
    hidden, weight = normal(4, WIDTH), normal(5, WIDTH, seed=1)
    learned = {"input": hidden, "linear_weight": weight}
    _, whole = gradients(neglog.linear_cross_entropy, learned, {"target": target})
    learned["linear_weight"] = cut(weight, 0, rank, world)
    _, own = gradients(
        neglog.vocab_parallel_linear_cross_entropy, learned, {"target": target, "vocab_size": 5}
    )
    near(own["input"], whole["input"], "hidden")
    near(own["linear_weight"], cut(whole["linear_weight"], 0, rank, world), "weight")


def hard(dtype: torch.dtype, smoothing: float, rank: int, world: int) -> None:
    """Rows that are nearly certain, of 1e4 and -inf, ignored NaN: errors no larger than torch's."""
    x = normal(8, VOCAB)
    x[0, 3] += 12  # p > 0.999
    x[1, 10] += 40
    x[2] *= 1e4
    x[3, [0, 4]] = -torch.inf
    x[4] = torch.nan
    x[5, :9] = -torch.inf
    x[6] = torch.inf
    target = torch.tensor([3, 10, 1, 2, -100, 10, -100, 6])
    x, options = x.to(dtype), {"target": target, "label_smoothing": smoothing, "reduction": "none"}
    clean = torch.where(target[:, None] == -100, 0, x)
    _, exact = gradients(torch.nn.functional.cross_entropy, {"input": clean.double()}, options)
    _, theirs = gradients(torch.nn.functional.cross_entropy, {"input": clean}, options)
    _, own = gradients(
        neglog.vocab_parallel_cross_entropy, {"input": cut(x, 1, rank, world)},
        {**options, "vocab_size": VOCAB},
    )  # fmt: skip
    truth, mine = cut(exact["input"], 1, rank, world), own["input"].double()
    assert (own["input"][[4, 6]] == 0).all()
    finite = exact["input"].isfinite().all(1)
    error = (mine - truth)[finite].abs()
    allowed = (theirs["input"] - exact["input"])[finite].abs()  # of all classes: one may be lucky
    assert error.max() <= 1.01 * allowed.max() + 1e-30, f"{error.max()} for {allowed.max()}"


def all_ignored(rank: int, world: int) -> None:
    x, target = normal(4, VOCAB), torch.full((4,), -100)
    for reduction in ("mean", "sum", "none"):
        given = {"target": target, "reduction": reduction}
        expected = neglog.cross_entropy(x, **given)
        own = cut(x, 1, rank, world).clone().requires_grad_()
        found = neglog.vocab_parallel_cross_entropy(own, **given, vocab_size=VOCAB)
        torch.testing.assert_close(found.detach(), expected, equal_nan=True)
        found.nansum().backward()
        assert (own.grad == 0).all()


def sixteen_bits(dtype: torch.dtype, rank: int, world: int) -> None:
    """Hidden states in 16 bits: errors near those of one process."""
    rows, width, vocab = 64, 48, 101
    hidden, weight = normal(rows, width), normal(vocab, width, seed=1) / 4
    target = torch.arange(rows) % vocab
    given = {"target": target}
    learned = {"input": hidden, "linear_weight": weight}
    _, exact = gradients(neglog.linear_cross_entropy, learned, given)
    learned = {name: x.to(dtype) for name, x in learned.items()}
    _, one = gradients(neglog.linear_cross_entropy, learned, given)
    learned["linear_weight"] = cut(learned["linear_weight"], 0, rank, world)
    _, own = gradients(
        neglog.vocab_parallel_linear_cross_entropy, learned, {**given, "vocab_size": vocab}
    )
    for name, grad in own.items():
        truth, reference = exact[name], one[name].double()
        if name == "linear_weight":
            truth, reference = cut(truth, 0, rank, world), cut(reference, 0, rank, world)
        error = (grad.double() - truth).norm()
        assert error <= 2 * (reference - truth).norm(), name  # parts are added up in 16 bits


def in_place(rank: int, world: int) -> None:
    x = normal(ROWS, VOCAB)
    for options in ({}, {"label_smoothing": 0.1}, {"reduction": "none"}, {"reduction": "sum"}):
        given = {"target": TARGET, **options}
        _, whole = gradients(neglog.cross_entropy, {"input": x}, given)
        leaf = cut(x, 1, rank, world).clone().requires_grad_()
        made = leaf * 1
        loss = neglog.vocab_parallel_cross_entropy(
            made, **given, vocab_size=VOCAB, inplace_backward=True
        )
        memory = made.data_ptr()
        (grad,) = torch.autograd.grad((loss * numbers_like(loss)).sum(), made)
        assert grad.data_ptr() == memory or not grad.numel()
        near(grad, cut(whole["input"], 1, rank, world), "gradient")
    with pytest.raises(RuntimeError, match="inplace_backward: input is a leaf"):
        neglog.vocab_parallel_cross_entropy(leaf, TARGET, vocab_size=VOCAB, inplace_backward=True)


def in_place_half(rank: int, world: int) -> None:
    """A mean over 2**21 targets: divided by before a loss scale, float16 would lose its numbers."""
    x, many = normal(ROWS, VOCAB).half(), 2**21
    leaf = cut(x, 1, rank, world).clone().requires_grad_()
    loss = neglog.vocab_parallel_cross_entropy(
        leaf * 1, TARGET, vocab_size=VOCAB, num_items=many, inplace_backward=True,
        loss_dtype=torch.float32,
    )  # fmt: skip
    (loss * many).backward()
    truth = x.double().requires_grad_()
    torch.nn.functional.cross_entropy(truth, TARGET, reduction="sum").backward()
    torch.testing.assert_close(
        leaf.grad.double(), cut(truth.grad, 1, rank, world), rtol=2e-3, atol=1e-7
    )


def second_derivatives(rank: int, world: int) -> None:
    """Of the loss of all, as one process has them."""
    x, direction = normal(ROWS, VOCAB), normal(ROWS, VOCAB, seed=9)
    hidden, weight, both = (
        normal(ROWS, WIDTH),
        normal(VOCAB, WIDTH, seed=1),
        normal(VOCAB, WIDTH, seed=7),
    )
    for options in ({}, {"label_smoothing": 0.2, "softcap": 2.0}, {"z_loss": 0.1}):
        leaf = x.clone().requires_grad_()
        loss = neglog.cross_entropy(leaf, TARGET, **options)
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (expected,) = torch.autograd.grad((first * direction).sum(), leaf)
        own = cut(x, 1, rank, world).clone().requires_grad_()
        loss = neglog.vocab_parallel_cross_entropy(own, TARGET, vocab_size=VOCAB, **options)
        (first,) = torch.autograd.grad(loss, own, create_graph=True)
        (found,) = torch.autograd.grad((first * cut(direction, 1, rank, world)).sum(), own)
        near(found, cut(expected, 1, rank, world), "logits")
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = neglog.linear_cross_entropy(*leaves, TARGET, **options)
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        expected = torch.autograd.grad((first[1] * both).sum(), leaves)
        leaves = [
            hidden.clone().requires_grad_(),
            cut(weight, 0, rank, world).clone().requires_grad_(),
        ]
        loss = neglog.vocab_parallel_linear_cross_entropy(
            *leaves, TARGET, vocab_size=VOCAB, **options
        )
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        found = torch.autograd.grad((first[1] * cut(both, 0, rank, world)).sum(), leaves)
        near(found[0], expected[0], "hidden")
        near(found[1], cut(expected[1], 0, rank, world), "weight")


def compiled_whole(rank: int, world: int) -> None:
    torch.compiler.reset()
    x, hidden, weight = (
        normal(ROWS, 4 * world),
        normal(ROWS, WIDTH),
        normal(4 * world, WIDTH, seed=1),
    )
    target = TARGET.clamp(max=4 * world - 1)
    own, part = cut(x, 1, rank, world), cut(weight, 0, rank, world)
    for options in ({}, {"label_smoothing": 0.1, "return_stats": True}):
        for function, learned in (
            (neglog.vocab_parallel_cross_entropy, {"input": own}),
            (neglog.vocab_parallel_linear_cross_entropy, {"input": hidden, "linear_weight": part}),
        ):
            given = {"target": target, "group": dist.group.WORLD, **options}
            expected = gradients(function, learned, given)
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(gradients(compiled, learned, given), expected)


def counts(rank: int, world: int) -> None:
    """Forward: the handshake and one gather of a few numbers a row. Backward: one all-reduce of
    (rows, features). And 3 matmuls."""
    rows, width, vocab = 40, 24, 64 * world
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocab // world, width, requires_grad=True)
    target = torch.arange(rows)
    dist.broadcast(hidden.data, 0)
    names = {}

    def count(name: str, run: Callable[[], Any]) -> Any:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=kinds, record_shapes=True) as profile:
            result = run()
        names[name] = list(profile.events())
        return result

    loss = count(
        "forward", lambda: neglog.vocab_parallel_linear_cross_entropy(hidden, weight, target)
    )
    count("backward", loss.backward)
    forward, backward = (
        [event for event in names[name] if event.name.startswith("c10d::")] for name in names
    )
    assert [event.name for event in forward] == ["c10d::allgather_"] * 2, forward
    assert [event.name for event in backward] == ["c10d::allreduce_"], backward
    products = [
        event
        for events in names.values()
        for event in events
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_")
    ]
    assert len(products) == 3, [event.name for event in products]


def unlike(rank: int, world: int) -> None:
    """Each process says what is not alike."""
    x, target = normal(ROWS, 4), TARGET.clamp(max=4)
    cases: dict[str, tuple[Any, ...]] = {
        "rows": (x[rank:], target[rank:], {}),
        "dtype": (x.to((torch.float32, torch.float64)[rank]), target, {}),
        "label_smoothing": (x, target, {"label_smoothing": 0.1 * rank}),
        "reduction": (x, target, {"reduction": ("sum", "mean")[rank]}),
        "softcap": (x, target, {"softcap": (None, 2.0)[rank]}),
        "weight": (x, target, {"weight": (None, normal(8).abs())[rank]}),
        "target": (x, target.roll(rank), {}),
        "requires_grad": (x.clone().requires_grad_(rank == 1), target, {}),
    }
    for name, (input, labels, options) in cases.items():
        with pytest.raises(RuntimeError, match=f"group: expected one {name} in all"):
            neglog.vocab_parallel_cross_entropy(input, labels, **options)
    with pytest.raises(RuntimeError, match="group: expected one workspace"):
        neglog.vocab_parallel_linear_cross_entropy(
            normal(ROWS, 3), normal(4, 3), target, options={"workspace_mb": 1 + rank}
        )
    with pytest.raises(RuntimeError, match="in_features"):
        neglog.vocab_parallel_linear_cross_entropy(
            normal(ROWS, 3 + rank), normal(4, 3 + rank), target
        )
    with pytest.raises(RuntimeError, match=r"input: expected 6 classes, those of rank \d of 2"):
        neglog.vocab_parallel_cross_entropy(x, target, vocab_size=12)
    with pytest.raises(
        IndexError, match=r"target 8 at row 1 is out of range: expected 0 <= target < 8"
    ):
        neglog.vocab_parallel_cross_entropy(x[:2], torch.tensor([1, 8]))
    with pytest.raises(ValueError, match="filter_eps: expected 0 over processes"):
        neglog.vocab_parallel_linear_cross_entropy(
            normal(ROWS, 3), normal(4, 3), target, options={"filter_eps": "auto"}
        )


def a_part_of_the_hidden_gradient(rank: int, world: int) -> None:
    hidden, weight = normal(ROWS, WIDTH), normal(VOCAB, WIDTH, seed=1)
    learned = {"input": hidden, "linear_weight": weight}
    _, whole = gradients(neglog.linear_cross_entropy, learned, {"target": TARGET})
    learned["linear_weight"] = cut(weight, 0, rank, world)
    _, own = gradients(
        neglog.vocab_parallel_linear_cross_entropy, learned,
        {"target": TARGET, "vocab_size": VOCAB, "reduce_hidden_grad": False},
    )  # fmt: skip
    dist.all_reduce(own["input"])
    near(own["input"], whole["input"], "hidden")


def checks(world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    backends = (BEST, "numba", "torch") if world == 2 else (BEST,)
    for backend in backends:
        for name, options in OPTIONS.items():
            if backend == "numba" and name not in ("all", "plain"):
                continue
            for stats in (False, True):
                given = (options, stats, torch.float64, backend)
                found[f"logits, {name}, {stats}, {backend}"] = partial(logits, *given)
                found[f"head, {name}, {stats}, {backend}"] = partial(head, *given)
            given = (options, False, torch.float32, backend)
            if "learned" not in name and world == 3:
                found[f"logits, {name}, float32"] = partial(logits, *given)
                found[f"head, {name}, float32"] = partial(head, *given)
        for name in ("plain", "smoothed", "weight", "none", "z_loss", "softcap"):
            found[f"probabilities, {name}, {backend}"] = partial(
                probabilities, OPTIONS[name], backend
            )
    tiny = {"options": {"workspace_mb": 1e-6}}
    for name in ("plain", "none", "all"):
        found[f"head, {name}, tiles"] = partial(
            head, OPTIONS[name] | tiny, True, torch.float64, BEST
        )
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 1]).bool()
    found["head, mask"] = partial(head, {"mask": mask}, True, torch.float64, BEST)
    found["head, shift"] = partial(head, {"shift": True}, True, torch.float64, BEST)
    for check in (
        shapes,
        all_ignored,
        in_place,
        in_place_half,
        second_derivatives,
        a_part_of_the_hidden_gradient,
    ):
        found[check.__name__] = check
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for smoothing in (0.0, 0.1):
            found[f"hard, {dtype}, {smoothing}"] = partial(hard, dtype, smoothing)
    if world == 4:
        found["few classes"] = few_classes
    if world == 2:
        found |= {"compiled": compiled_whole, "unlike": unlike, "counts": counts}
        for dtype in (torch.bfloat16, torch.float16):
            found[f"{dtype}"] = partial(sixteen_bits, dtype)
    return found


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def said(request: Any, tmp_path_factory: Any) -> dict[str, list[str]]:
    world = request.param
    return ranks.run(
        checks(world), world, tmp_path_factory.mktemp("ranks"), seconds=240, one_group=True
    )


def test_one_process_with_all_classes(said: dict[str, list[str]]) -> None:
    failed = {name: next(x for x in each if x) for name, each in said.items() if any(each)}
    assert not failed, f"{len(failed)} of {len(said)}: " + "\n".join(
        f"{name}: {error[-500:]}" for name, error in list(failed.items())[:9]
    )


def test_without_a_group() -> None:
    x, weight = normal(ROWS, VOCAB), normal(VOCAB, WIDTH)
    assert torch.equal(
        neglog.vocab_parallel_cross_entropy(x, TARGET, label_smoothing=0.1),
        neglog.cross_entropy(x, TARGET, label_smoothing=0.1),
    )
    hidden = normal(ROWS, WIDTH, seed=2)
    assert torch.equal(
        neglog.vocab_parallel_linear_cross_entropy(hidden, weight, TARGET),
        neglog.linear_cross_entropy(hidden, weight, TARGET),
    )
