"""cached_step with data-parallel modules: the gradient of all processes' whole batches."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import neglog
from tests.support import ranks

ROWS, CHUNK = 8, 3


class Towers(nn.Module):
    """Two encoders of {"image": (N, 6)} or {"text": (N, 6)}, and the scale of their loss."""

    def __init__(self, tied=False, unused=False, norm=False, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        self.text = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        if tied:
            self.text[0].weight = self.image[0].weight
        if norm:
            self.image.append(nn.BatchNorm1d(4))
        self.unused = nn.Linear(2, 2) if unused else None
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.to(dtype)

    def forward(self, given):
        ((kind, x),) = given.items()
        return getattr(self, kind)(x)

    def loss(self, image, text):
        return neglog.clip_loss(image, text, self.log_scale.exp())


def batch(rank, step, dtype=torch.float64, rows=None):
    """A process's inputs: more rows, and more chunks, on later ranks."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    shape = (ROWS + 4 * rank if rows is None else rows, 6)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return {"image": x.to(dtype)}, {"text": y.to(dtype)}


def whole(towers, step, world, loss=None, encode=None, rows=None):
    """Adds to .grad what one process with all the batches would."""
    dtype = towers.log_scale.dtype
    for rank in range(world):
        image, text = batch(rank, step, dtype, rows)
        run = towers if encode is None else encode
        ((loss or towers.loss)(run(image), run(text)) / world).backward()


def agree(found, expected, tolerance=1e-9):
    """All gradients are those expected, on all ranks."""
    for (name, x), (_, y) in zip(
        found.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert (x.grad is None) == (y.grad is None), name
        if x.grad is not None:
            error = (x.grad - y.grad).norm() / (y.grad.norm() + 1e-30)
            assert error <= tolerance or not y.grad.any(), f"{name}: {error}"
            parts = [torch.empty_like(x.grad) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, x.grad.contiguous())
            assert all(torch.equal(part, parts[0]) for part in parts), name


def collectives(run, name):
    """How many of a name `run` asks for."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(event.count for event in profile.key_averages() if event.key == name)


def steps(rank, world, frozen=None, late=False, number=4, dtype=torch.float64, towers=None,
          accumulated=False, **options):  # fmt: skip
    """Some steps of gradient descent, in as many all-reduces as DistributedDataParallel's own."""
    found = Towers(**towers or {}, dtype=dtype)
    expected, plain = copy.deepcopy(found), copy.deepcopy(found)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-6

    def freeze(module):
        if frozen:
            getattr(module, frozen).requires_grad_(False)

    if not late:
        freeze(found)
    module = DistributedDataParallel(found, **options)
    freeze(found), freeze(expected)
    for step in range(number):
        for some in (found, expected):
            if not accumulated:
                some.zero_grad(set_to_none=step % 2 == 0)
        inputs = batch(rank, step, dtype)

        def run(inputs=inputs):
            neglog.cached_step(module, inputs, found.loss, chunk_size=CHUNK)

        if step < number - 1:
            run()
        else:
            reductions = collectives(run, "c10d::allreduce_")
        whole(expected, step, world)
        if late:  # of what is frozen nothing is asked
            assert all(x.grad is None for x in getattr(found, frozen).parameters())
        agree(found, expected, tolerance)
        with torch.no_grad():
            for some in (found, expected):
                for x in some.parameters():
                    if x.grad is not None:
                        x -= 0.05 * x.grad
    own = _reductions_of_one_forward(plain, frozen, rank, dtype, options)
    assert reductions == own, f"{reductions} all-reduces for {own}"


def _reductions_of_one_forward(towers, frozen, rank, dtype, options):
    """How many all-reduces a step takes whose one forward uses every parameter."""

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.towers = towers

        def forward(self, image, text):
            return self.towers.loss(self.towers(image), self.towers(text))

    if frozen:
        getattr(towers, frozen).requires_grad_(False)
    module = DistributedDataParallel(Loss(), **options)
    for _ in range(2):  # the first differ, where buckets or a static graph are found out
        module(*batch(rank, 0, dtype)).backward()
    return collectives(module(*batch(rank, 0, dtype)).backward, "c10d::allreduce_")


# Each option alone, as each changes when the reducer reduces, and those that meet in one place.
def plain(rank, world):
    steps(rank, world)


def single_precision(rank, world):
    steps(rank, world, dtype=torch.float32)


def small_buckets(rank, world):
    steps(rank, world, bucket_cap_mb=1e-6)


def bucket_views(rank, world):
    steps(rank, world, gradient_as_bucket_view=True)


def accumulation(rank, world):
    steps(rank, world, accumulated=True, gradient_as_bucket_view=True)
    steps(rank, world, accumulated=True)


def static_graph(rank, world):
    steps(rank, world, static_graph=True)


def static_graph_with_views_and_unused(rank, world):
    options = {"static_graph": True, "gradient_as_bucket_view": True}
    steps(rank, world, towers={"unused": True}, **options)


def unused_parameters(rank, world):
    steps(rank, world, towers={"unused": True}, find_unused_parameters=True)


def tied(rank, world):
    steps(rank, world, towers={"tied": True})


def last_tower_frozen(rank, world):
    steps(rank, world, frozen="text")


def first_tower_frozen_late(rank, world):
    steps(rank, world, frozen="image", late=True)
    steps(rank, world, frozen="image", late=True, find_unused_parameters=True)


def hooks(rank, world):
    """A communication hook sees each bucket once."""
    found, expected, seen = Towers(), Towers(), []
    module = DistributedDataParallel(found)

    def hook(state, bucket):
        seen.append(bucket.index())
        total = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return total.then(lambda future: future.value()[0] / world)

    module.register_comm_hook(None, hook)
    for step in range(2):
        found.zero_grad(), expected.zero_grad()
        neglog.cached_step(module, batch(rank, step), found.loss, chunk_size=CHUNK)
        whole(expected, step, world)
        agree(found, expected)
    assert seen == [0, 0]


def functions(rank, world):
    """Functions around a module, around two, a method, and a list of these."""
    found, expected = Towers(), Towers()
    first, second = DistributedDataParallel(found.image), DistributedDataParallel(found.text)

    class Model:
        def encode(self, given):
            return both(given)

    def both(given):
        ((kind, x),) = given.items()
        return F.normalize((first if kind == "image" else second)(x), dim=-1)

    apart = [lambda x: F.normalize(first(x["image"]), dim=-1), both]
    with_scale = DistributedDataParallel(found)
    for step, encode in enumerate([both, Model().encode, apart]):
        found.zero_grad(), expected.zero_grad()
        inputs = batch(rank, step)

        def run(encode=encode, inputs=inputs):
            neglog.cached_step(encode, inputs, neglog.info_nce, chunk_size=CHUNK)

        assert collectives(run, "c10d::allreduce_") == 2  # one a module
        whole(expected, step, world, neglog.info_nce)
        agree(found, expected)
    found.zero_grad(), expected.zero_grad()
    neglog.cached_step(lambda x: with_scale(x), batch(rank, 3), found.loss, chunk_size=CHUNK)
    whole(expected, 3, world)
    agree(found, expected)


def losses(rank, world):
    """A data-parallel module that the loss calls reduces its own, once."""

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.tensor(1.0).double())

        def forward(self, image, text):
            return neglog.clip_loss(image, text, self.log_scale.exp())

    found, expected = nn.ModuleList([Towers(), Loss()]), nn.ModuleList([Towers(), Loss()])
    towers, loss = DistributedDataParallel(found[0]), DistributedDataParallel(found[1])
    for step in range(3):
        found.zero_grad(), expected.zero_grad()

        def run(step=step):
            neglog.cached_step(towers, batch(rank, step), loss, chunk_size=CHUNK)

        assert collectives(run, "c10d::allreduce_") == 2
        whole(expected[0], step, world, expected[1])
        expected[0].log_scale.grad = torch.zeros_like(expected[0].log_scale)
        agree(found, expected)


def buffers(rank, world):
    """Buffers are broadcast once a step, whatever the number of chunks."""
    found, seen = Towers(norm=True), []
    module = DistributedDataParallel(found)
    for step in range(3):

        def run(step=step):
            neglog.cached_step(module, batch(rank, step), found.loss, chunk_size=CHUNK)

        seen.append(collectives(run, "c10d::broadcast_"))
        found.zero_grad()
    once = collectives(lambda: module(batch(rank, 0)[0]), "c10d::broadcast_")
    assert seen == [once, once + 2, once]  # two, once, for buckets that are built anew


def part_of_the_ranks(rank, world):
    """Parameters that one process alone uses; and none at all keep no gradient."""
    towers = Towers(unused=True)
    module = DistributedDataParallel(towers, find_unused_parameters=True)
    expected = copy.deepcopy(towers)
    kinds = ("image", "text") if rank == 0 else ("image", "image")

    def named(inputs, kinds=kinds):
        return [dict.fromkeys([kind], *x.values()) for kind, x in zip(kinds, inputs, strict=True)]

    neglog.cached_step(module, named(batch(rank, 0)), neglog.info_nce, chunk_size=CHUNK)
    for other in range(world):
        inputs = named(batch(other, 0), ("image", "text") if other == 0 else ("image", "image"))
        (neglog.info_nce(*map(expected, inputs)) / world).backward()
    agree(towers, expected)


def gathered_over_steps(rank, world):
    """Under the caller's no_sync nothing is reduced, and the next step reduces it all."""
    found, expected = Towers(), Towers()
    module = DistributedDataParallel(found)
    for step in range(4):

        def run(step=step):
            neglog.cached_step(module, batch(rank, step), found.loss, chunk_size=CHUNK)

        if step % 2 == 0:
            with module.no_sync():
                assert collectives(run, "c10d::allreduce_") == 0
        else:
            run()
        whole(expected, step, world)
    agree(found, expected)


def mixed_steps(rank, world):
    """Steps of torch's own between."""
    for options, own in (({}, 0), ({"static_graph": True}, 1)):
        found, expected = Towers(), Towers()
        module = DistributedDataParallel(found.image, **options)
        for step in range(5):
            found.zero_grad(), expected.zero_grad()
            x = batch(rank, step)[0]["image"]
            if step % 2 == own:
                module(x).square().mean().backward()
            else:
                neglog.cached_step(module, (x,), lambda x: x.square().mean(), chunk_size=CHUNK)
            for other in range(world):
                made = expected.image(batch(other, step)[0]["image"])
                (made.square().mean() / world).backward()
            agree(found, expected)


def teachers(rank, world):
    """A module that the encoder calls without gradients is left alone."""
    student, teacher = Towers(), Towers()
    expected = copy.deepcopy(student)
    modules = [DistributedDataParallel(x) for x in (student, teacher)]

    def encode(given):
        with torch.no_grad():
            target = modules[1](given)
        return modules[0](given) + target

    def run():
        neglog.cached_step(encode, batch(rank, 0), student.loss, chunk_size=CHUNK)

    assert collectives(run, "c10d::allreduce_") == 1
    whole(expected, 0, world, encode=lambda x: expected(x) + teacher(x).detach())
    agree(student, expected)
    assert all(x.grad is None for x in teacher.parameters())


def evaluation(rank, world):
    """Without gradients: the loss, and no reduction."""
    found = Towers(norm=True)
    module, inputs = DistributedDataParallel(found), batch(rank, 0)
    losses = []

    def run():
        with torch.no_grad():
            losses.append(neglog.cached_step(module, inputs, found.loss, chunk_size=64))

    assert collectives(run, "c10d::allreduce_") == 0
    expected = Towers(norm=True)
    torch.testing.assert_close(losses[0], expected.loss(*map(expected, inputs)).detach())
    assert all(x.grad is None for x in found.parameters())


class Synchronised(nn.SyncBatchNorm):
    """Has no CPU form; what it waits for is not reached here."""

    def forward(self, x):
        return x


def queues(rank, world):
    """The numbers of a queue are broadcast with its keys."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.queue = nn.Linear(3, 3), neglog.nn.Queue(8, 3)

        def forward(self, x):
            return self.linear(x) + 0 * self.queue().sum()

    model = Model()
    module = DistributedDataParallel(model)
    model.queue.push(torch.full((2 + 3 * rank, 3), rank + 1.0))
    module(torch.ones(2, 3)).sum().backward()
    assert model.queue.position.tolist() == [2, 2]  # those of the first process
    assert torch.equal(model.queue(), torch.ones(2, 3))
    model.queue.push(torch.full((1, 3), 5.0))
    assert model.queue.keys[2].tolist() == [5, 5, 5]


def biases(rank, world):
    """A bias that changes nothing has a gradient, for which the module waits."""

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.bias = (nn.Parameter(torch.tensor(x)) for x in (2.0, -1.0))

        def forward(self, image, text):
            return neglog.clip_loss(image, text, self.scale, self.bias)

    loss = DistributedDataParallel(Loss())
    for step in range(3):
        image, text = batch(rank, step, torch.float32)
        loss(image["image"], text["text"]).backward()
    assert loss.module.bias.grad == 0


def what_cannot_be(rank, world):
    """Each is refused, on all ranks."""
    linear = DistributedDataParallel(nn.Linear(6, 4).double())
    encode = nn.Sequential(linear, Synchronised(4))
    inputs = [next(iter(x.values())) for x in batch(rank, 0)]
    with pytest.raises(RuntimeError, match=r"one number of chunks .* got \[3, 3\] to \[\d, \d\]"):
        neglog.cached_step(encode, inputs, neglog.info_nce, chunk_size=CHUNK)
    inputs = [next(iter(x.values())) for x in batch(rank, 0, rows=8)]
    neglog.cached_step(encode, inputs, neglog.info_nce, chunk_size=CHUNK)
    with Join([linear]), pytest.raises(RuntimeError, match="outside Join"):
        neglog.cached_step(linear, inputs, neglog.info_nce)
    static = DistributedDataParallel(nn.Linear(6, 4).double(), static_graph=True)
    static(inputs[0]).sum().backward()
    with pytest.raises(RuntimeError, match="whose first step is that of cached_step"):
        neglog.cached_step(static, inputs, neglog.info_nce)


def sharded(rank, world):
    """fully_shard: a reduce-scatter for each of its modules, in the last chunk that learns."""
    for frozen in (False, True):
        found = Towers()
        del found.log_scale  # it takes no scalars
        found.text.requires_grad_(not frozen)
        expected = copy.deepcopy(found)
        mesh = dist.init_device_mesh("cpu", (world,))
        for module in (found.image[2], found.text, found):
            fully_shard(module, mesh=mesh)
        for step in range(2):
            found.zero_grad(), expected.zero_grad()

            def run(step=step, found=found):
                inputs = batch(rank, step, rows=ROWS)
                neglog.cached_step(found, inputs, neglog.info_nce, chunk_size=CHUNK)

            assert collectives(run, "c10d::_reduce_scatter_base_") == 3
            for other in range(world):
                inputs = batch(other, step, rows=ROWS)
                (neglog.info_nce(*map(expected, inputs)) / world).backward()
            for x, y in zip(found.parameters(), expected.parameters(), strict=True):
                if y.grad is not None:
                    torch.testing.assert_close(x.grad.full_tensor(), y.grad)


CHECKS = [
    plain, single_precision, small_buckets, bucket_views, accumulation, static_graph,
    static_graph_with_views_and_unused, unused_parameters, tied, last_tower_frozen,
    first_tower_frozen_late, hooks, functions, losses, buffers, part_of_the_ranks,
    gathered_over_steps, mixed_steps, teachers, evaluation, queues, biases, what_cannot_be, sharded,
]  # fmt: skip
OF_THREE = [plain, functions, static_graph]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What the ranks of two and of three processes say of each check."""
    found = {}
    for world, checks in ((2, CHECKS), (3, OF_THREE)):
        named = {check.__name__: check for check in checks}
        found[world] = ranks.run(named, world, tmp_path_factory.mktemp("ranks"))
    return found


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_two_processes(said, check):
    assert said[2][check.__name__] == ["", ""], "\n".join(said[2][check.__name__])


@pytest.mark.parametrize("check", OF_THREE, ids=lambda check: check.__name__)
def test_three_processes(said, check):
    assert said[3][check.__name__] == [""] * 3, "\n".join(said[3][check.__name__])
