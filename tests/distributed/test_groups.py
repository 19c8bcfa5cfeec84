"""clip_loss and siglip_loss over processes: each one's part of the whole batch's loss."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import neglog
from tests.support.backends import BEST

WORLD, ROWS, FEATURES = 2, 300, 12
CASES = [(name, backend) for name in ("clip_loss", "siglip_loss") for backend in (BEST, "torch")]


def batch():
    generator = torch.Generator().manual_seed(0)
    image, text = (
        torch.nn.functional.normalize(
            torch.randn(WORLD * ROWS, FEATURES, generator=generator, dtype=torch.float64), dim=1
        )
        for _ in range(2)
    )
    return image, text, torch.tensor(10.0, dtype=torch.float64), torch.tensor(-3.0).double()


def ids():
    """Of each row, shared with rows of its own process and of others."""
    return torch.arange(WORLD * ROWS) * 7 % 50


def loss_and_gradients(name, inputs, **options):
    inputs = [x.clone().requires_grad_() for x in inputs]
    loss = getattr(neglog, name)(*inputs, **options)
    return loss.detach(), torch.autograd.grad(loss, inputs[: 3 if name == "clip_loss" else 4])


def work(rank, place, results):
    """What each process finds: by case, its loss and gradients; and what it was refused."""
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=WORLD)
    image, text, scale, bias = batch()
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    inputs = (image[mine], text[mine], scale, bias)
    found = {}
    for name, backend in CASES:
        loss, grads = loss_and_gradients(name, inputs, group=dist.group.WORLD, backend=backend)
        found[name, backend] = (loss.numpy(), [g.numpy() for g in grads])
        loss, grads = loss_and_gradients(
            name, inputs, group=dist.group.WORLD, backend=backend, exclude=ids()[mine]
        )
        found[name, backend, "exclude"] = (loss.numpy(), [g.numpy() for g in grads])
    refused = ""
    try:
        neglog.clip_loss(image[: 3 + rank], text[: 3 + rank], scale, group=dist.group.WORLD)
    except RuntimeError as error:
        refused = str(error)
    results.put((rank, found, refused))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The results of two processes, by rank. Started once: to import torch takes them seconds."""
    results = mp.get_context("spawn").SimpleQueue()
    arguments = (str(tmp_path_factory.mktemp("group") / "meeting"), results)
    running = mp.start_processes(work, arguments, nprocs=WORLD, join=False, start_method="spawn")
    found = sorted((results.get() for _ in range(WORLD)), key=lambda result: result[0])
    running.join()
    return found


# The gathers are the same above every kernel: one, and the formula. Ids of rows are gathered too.
@pytest.mark.parametrize("excluding", [False, True])
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_the_mean_over_processes_is_the_whole(processes, name, backend, excluding):
    options, key = {}, (name, backend)
    if excluding:
        options, key = {"exclude": ids()}, (*key, "exclude")
    loss, grads = loss_and_gradients(name, batch(), **options)
    losses, parts = zip(*(found[key] for _, found, _ in processes), strict=True)
    assert sum(float(part) for part in losses) / WORLD == pytest.approx(float(loss))
    for index, whole in enumerate(grads):
        of_each = [torch.as_tensor(part[index]) / WORLD for part in parts]
        mean = torch.cat(of_each) if index < 2 else sum(of_each)
        torch.testing.assert_close(mean, whole)


def test_batches_of_two_sizes_are_refused(processes):
    assert all("group: expected one shape" in refused for *_, refused in processes)


def pair_of(rows, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(rows, 5, generator=generator, dtype=dtype) for _ in range(2))


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


GROUPED = {
    "clip_loss": lambda x, y, group: neglog.clip_loss(x, y, 2.0, group=group),
    "siglip_loss": lambda x, y, group: neglog.siglip_loss(x, y, 2.0, -1.0, group=group),
}


@pytest.mark.parametrize("loss", GROUPED.values(), ids=GROUPED.keys())
def test_a_group_of_one_changes_nothing(group, compiled_or_torch, loss):
    x, y = (part.requires_grad_() for part in pair_of(6))

    def derivatives(group):
        first = torch.autograd.grad(loss(x, y, group), (x, y), create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, y))

    torch.testing.assert_close(derivatives(group), derivatives(None))
    of_x = torch.func.grad(lambda x: loss(x, y, group))(x)
    torch.testing.assert_close(of_x, derivatives(None)[0])


@pytest.mark.parametrize("loss", GROUPED.values(), ids=GROUPED.keys())
def test_a_group_compiles_whole(group, loss):
    torch.compiler.reset()
    x, y = pair_of(6, torch.float32)
    compiled = torch.compile(lambda x, y: loss(x, y, group), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), loss(x, y, None))


@pytest.mark.parametrize("kind", [neglog.nn.CLIPLoss, neglog.nn.SigLIPLoss])
def test_a_module_with_a_group_is_copied(group, kind):
    module = kind(group=group)
    made = copy.deepcopy(torch.nn.Sequential(module))[0]
    assert made is not module
    assert made.group is group
