"""DTensors as arguments: every loss and gradient is that of the whole tensors."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel

import neglog
from tests.support import ranks

ROWS, CLASSES, WIDTH = 5, 7, 3  # none a multiple of two


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


TARGET = torch.tensor([0, 3, -100, 6, 2])
MASK = torch.tensor([True, False, True, True, False])
HEAD = {"linear_weight": normal(CLASSES, WIDTH, seed=1), "linear_bias": normal(CLASSES, seed=2)}
OPTIONS = {
    "plain": {}, "num_items": {"num_items": torch.tensor(3)}, "stats": {"return_stats": True},
    "softcap": {"softcap": 2.0}, "z_loss": {"z_loss": 0.1}, "smoothed": {"label_smoothing": 0.1},
    "scaled": {"logit_scale": torch.tensor(1.5).double()}, "none": {"reduction": "none"},
    "sum": {"reduction": "sum"}, "weighted": {"weight": normal(CLASSES, seed=3).abs()},
    "by torch": {"backend": "torch"},
}  # fmt: skip


def outcome(function, tensors, options, sharded, mesh):
    """The loss, what is beside it, and the gradients, as whole tensors."""
    given = {}
    for name, x in {**tensors, **options}.items():
        given[name] = x
        if isinstance(x, torch.Tensor) and name in sharded:
            given[name] = distribute_tensor(x, mesh, sharded[name])
        if name in tensors and x.is_floating_point():
            given[name] = given[name].detach().requires_grad_()
    result = function(**given)
    results = [result] if isinstance(result, torch.Tensor) else list(result)
    (results[0] * _numbers_like(results[0])).sum().backward()
    leaves = [x for x in given.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    for x in leaves:
        assert type(x.grad) is type(x)
        assert not isinstance(x, DTensor) or x.grad.placements == x.placements
    assert all(isinstance(x, DTensor) == bool(sharded) for x in results)
    return [_whole(x) for x in (*results, *(x.grad for x in leaves))]


def _numbers_like(result):
    """1, 2, ..., so that each row's gradient is another."""
    numbers = torch.arange(1.0, result.numel() + 1).view(result.shape)
    if not isinstance(result, DTensor):
        return numbers
    placements = [x if x.is_shard() else Replicate() for x in result.placements]
    return distribute_tensor(numbers, result.device_mesh, placements)


def _whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def same(function, tensors, options, *layouts, mesh=None, context=nullcontext):
    """Whatever is sharded, results are those of the whole tensors."""
    mesh = mesh or dist.init_device_mesh("cpu", (dist.get_world_size(),))
    expected = outcome(function, tensors, options, {}, mesh)
    for layout in layouts:
        with context():
            found = outcome(function, tensors, options, layout, mesh)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x.detach(), y.detach(), msg=f"{layout}: {x} for {y}")


LOGITS = {"input": normal(ROWS, CLASSES), "target": TARGET}
BY_CLASS, BY_ROW = [Shard(1)], [Shard(0)]
ALL = [Replicate()]


def logits(rank, world):
    """Sharded by class or row, evenly or not, or whole; other arguments plain or not."""
    for options in OPTIONS.values():
        layouts = [
            {"input": BY_CLASS}, {"input": BY_ROW}, {"input": ALL}, {"target": ALL},
            {"input": BY_CLASS, "target": ALL, "weight": ALL, "num_items": ALL},
            {"input": BY_ROW, "target": BY_ROW, "logit_scale": ALL},
        ]  # fmt: skip
        same(neglog.cross_entropy, LOGITS, options, *layouts)


def logits_under_loss_parallel(rank, world):
    for options in OPTIONS.values():
        layouts = [{"input": BY_CLASS}, {"input": BY_CLASS, "target": ALL}, {"input": BY_ROW}]
        same(neglog.cross_entropy, LOGITS, options, *layouts, context=loss_parallel)


def probabilities(rank, world):
    tensors = {"input": normal(ROWS, CLASSES), "target": normal(ROWS, CLASSES, seed=5).softmax(1)}
    layouts = [{"input": BY_CLASS}, {"input": BY_CLASS, "target": BY_ROW}, {"target": BY_CLASS}]
    for context in (nullcontext, loss_parallel):
        same(neglog.cross_entropy, tensors, {}, *layouts, context=context)


def partial_sums(rank, world):
    """Logits whose sum over processes is still to be taken, of which the whole is the sum."""
    mesh = dist.init_device_mesh("cpu", (world,))
    parts = [normal(ROWS, CLASSES, seed=s) for s in range(world)]
    x = DTensor.from_local(parts[rank].requires_grad_(), mesh, [Partial()])
    loss = neglog.cross_entropy(x, TARGET, z_loss=0.1)
    whole = sum(part.detach() for part in parts).requires_grad_()
    expected = neglog.cross_entropy(whole, TARGET, z_loss=0.1)
    for each in (loss, expected):
        each.backward()
    torch.testing.assert_close(loss.full_tensor(), expected)
    torch.testing.assert_close(parts[rank].grad, whole.grad)


def masked(rank, world):
    tensors = {"input": normal(ROWS, CLASSES), "target": TARGET.abs() % CLASSES}
    for context in (nullcontext, loss_parallel):
        for options in OPTIONS.values():
            layouts = [{"input": BY_CLASS}, {"input": BY_ROW, "mask": BY_ROW}]
            options = {**options, "mask": MASK}
            same(neglog.masked_cross_entropy, tensors, options, *layouts, context=context)


def heads(rank, world):
    tensors = {"input": normal(ROWS, WIDTH), "target": TARGET, **HEAD}
    by_class = {"linear_weight": BY_ROW, "linear_bias": BY_ROW}
    for context in (nullcontext, loss_parallel):
        for options in OPTIONS.values():
            if isinstance(options.get("logit_scale"), torch.Tensor):
                options = {"logit_scale": 1.5}
            layouts = [by_class, {**by_class, "input": ALL, "target": ALL}, {"input": BY_ROW}]
            same(neglog.linear_cross_entropy, tensors, options, *layouts, context=context)


def tokens(rank, world):
    """What gathers whatever is sharded."""
    weights = {"token_weight": normal(ROWS, seed=4).abs(), "per_sequence": True}
    for name in weights:
        options = {name: weights[name]}
        same(neglog.cross_entropy, LOGITS, options, {"input": BY_CLASS, "token_weight": BY_ROW})
        tensors = {"input": normal(ROWS, WIDTH), "target": TARGET, **HEAD}
        same(neglog.linear_cross_entropy, tensors, options, {"input": BY_ROW}, {"target": ALL})
        masked = {**LOGITS, "target": TARGET.abs() % CLASSES}
        layouts = [{"input": BY_CLASS}, {"input": BY_ROW, "mask": BY_ROW}]
        same(neglog.masked_cross_entropy, masked, {**options, "mask": MASK}, *layouts)
    tensors = {"logits": LOGITS["input"], "target": TARGET}
    same(neglog.token_logprobs, tensors, {}, {"logits": BY_CLASS}, {"target": BY_ROW})
    tensors = {"input": normal(ROWS, WIDTH), "target": TARGET, **HEAD}
    layouts = [{"input": BY_ROW}, {"linear_weight": BY_ROW}]
    same(neglog.linear_token_logprobs, tensors, {}, *layouts)
    teacher = {"teacher": normal(ROWS, CLASSES, seed=6)}
    layouts = [{"input": BY_CLASS}, {"teacher": BY_ROW}]
    same(neglog.kl_div_loss, {"input": LOGITS["input"]}, teacher, *layouts)
    tensors = {"input": normal(ROWS, WIDTH), **HEAD}
    same(neglog.linear_kl_div_loss, tensors, teacher, {"linear_weight": BY_ROW})


def in_place(rank, world):
    """No argument is overwritten."""

    def loss(input, target):
        distributed = isinstance(input, DTensor)
        return neglog.cross_entropy(input, target, z_loss=0.1, inplace_backward=distributed)

    for placements in (BY_CLASS, ALL):
        same(loss, LOGITS, {}, {"input": placements})
        mesh = dist.init_device_mesh("cpu", (world,))
        x = distribute_tensor(LOGITS["input"], mesh, placements).requires_grad_() * 1
        loss(x, TARGET)
        assert torch.equal(x.full_tensor(), LOGITS["input"])


def many_dimensions(rank, world):
    """Logits (N, C, d) on a mesh of two dimensions, of which one shards the classes."""
    mesh = dist.init_device_mesh("cpu", (1, world))
    tensors = {"input": normal(3, CLASSES, 2), "target": torch.tensor([[1, 2], [0, 6], [-100, 3]])}
    layouts = [{"input": [Replicate(), Shard(1)]}, {"input": [Shard(0), Shard(1)]},
               {"input": [Shard(2), Shard(0)], "target": [Shard(1), Shard(0)]}]  # fmt: skip
    for context in (nullcontext, loss_parallel):
        for options in ({}, {"reduction": "sum"}, {"softcap": 3.0}):
            same(neglog.cross_entropy, tensors, options, *layouts, mesh=mesh, context=context)


def contrastive(rank, world):
    x, y = {"query": normal(ROWS, WIDTH)}, {"positive_key": normal(ROWS, WIDTH, seed=1)}
    keys, ids = {"negative_keys": normal(4, WIDTH, seed=2)}, torch.tensor([1, 1, 2, 3, 4])
    temperature = {"temperature": torch.tensor(0.2).double()}
    layouts = [{"query": BY_ROW}, {"query": BY_ROW, "positive_key": BY_ROW, "exclude": BY_ROW},
               {"positive_key": BY_CLASS, "negative_keys": BY_ROW, "temperature": ALL}]  # fmt: skip
    same(neglog.info_nce, {**x, **y, **keys, **temperature}, {"return_stats": True}, *layouts)
    same(neglog.info_nce, {**x, **y, **temperature}, {"exclude": ids}, *layouts)
    same(neglog.info_nce, {**x, **y}, {"reduction": "none", "symmetric": True}, *layouts)
    by_row = {"positive_key": BY_ROW, "positives": BY_ROW, "negative_ids": ALL}
    several = {"positives": torch.tensor([[0, 1], [1, -1], [2, 3], [4, 0], [3, 3]])}
    same(neglog.info_nce, {**x, **y}, several, by_row)
    of_queue = {
        "exclude": ids,
        "negative_ids": torch.tensor([1, 5, 6, 2]),
        "negative_mode": "in_batch",
    }
    same(neglog.info_nce, {**x, **y, **keys}, of_queue, {"exclude": BY_ROW}, by_row)
    for function in (neglog.nt_xent, neglog.dcl):
        tensors = {"z_i": x["query"], "z_j": y["positive_key"]}
        same(function, tensors, {}, {"z_i": BY_ROW}, {"z_i": BY_ROW, "z_j": BY_ROW})
    tensors = {"features": x["query"], "labels": ids}
    same(neglog.sup_con, tensors, {}, {"features": BY_ROW}, {"features": BY_ROW, "labels": BY_ROW})
    for function in (neglog.clip_loss, neglog.siglip_loss):
        tensors = {
            "image_features": x["query"], "text_features": y["positive_key"],
            "logit_scale": torch.tensor(2.0).double(), "logit_bias": torch.tensor(-1.0).double(),
        }  # fmt: skip
        same(function, tensors, {}, {"image_features": BY_ROW}, dict.fromkeys(tensors, ALL))
        same(function, tensors, {"exclude": ids}, {"image_features": BY_ROW, "exclude": BY_ROW})
        mesh = dist.init_device_mesh("cpu", (world,))
        sharded = distribute_tensor(x["query"], mesh, BY_ROW)
        with pytest.raises(ValueError, match="group: expected none with DTensors"):
            function(sharded, sharded, 1.0, 1.0, group=dist.group.WORLD)


def kernels(rank, world):
    """They run, and a backend that is named too."""
    mesh = dist.init_device_mesh("cpu", (world,))
    x = distribute_tensor(LOGITS["input"], mesh, BY_CLASS)
    best = neglog.explain(neglog.cross_entropy, *LOGITS.values()).backend
    assert neglog.explain(neglog.cross_entropy, x, TARGET).backend == best
    with loss_parallel():
        assert neglog.explain(neglog.cross_entropy, x, TARGET).backend == best
        with neglog.dispatch.record() as ran:
            found = neglog.cross_entropy(x, TARGET, backend=best)
    assert ran == [f"nll:{best}"]
    torch.testing.assert_close(found.full_tensor(), neglog.cross_entropy(**LOGITS))
    with pytest.raises(TypeError, match="target"):
        neglog.cross_entropy(x, [1, 2, 3, 4, 5])


CHECKS = [
    logits, logits_under_loss_parallel, probabilities, partial_sums, masked, heads, tokens,
    in_place, many_dimensions, contrastive, kernels,
]  # fmt: skip


# One process, in which nothing is sharded but in name, and two.
@pytest.fixture(scope="module", params=[1, 2])
def said(request, tmp_path_factory):
    named = {check.__name__: check for check in CHECKS}
    return ranks.run(named, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_whole_tensors(said, check):
    assert not any(said[check.__name__]), "\n".join(said[check.__name__])
