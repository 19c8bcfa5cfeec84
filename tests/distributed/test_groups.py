"""clip_loss and siglip_loss over processes: each one's part of the whole batch's loss."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist

import neglog
from tests.support import ranks
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


def mean_over_processes(name, backend, excluding, rank, world):
    """Of losses and gradients it is that of the whole batch; of rows each has its own."""
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    image, text, scale, bias = batch()
    options = [{"exclude": ids()[mine]}, {"exclude": ids()}] if excluding else [{}, {}]
    inputs = (image[mine], text[mine], scale, bias)
    loss, grads = loss_and_gradients(
        name, inputs, group=dist.group.WORLD, backend=backend, **options[0]
    )
    whole_loss, whole = loss_and_gradients(name, batch(), **options[1])
    for x in (loss, *grads[2:]):
        dist.all_reduce(x)
    found = [loss / world, *(x / world for x in grads)]
    torch.testing.assert_close(found, [whole_loss, *(x[mine] for x in whole[:2]), *whole[2:]])


def unlike_batches(rank, world):
    """Batches of two sizes are refused, by each process."""
    image, text, scale, _ = batch()
    with pytest.raises(RuntimeError, match="group: expected one shape"):
        neglog.clip_loss(image[: 3 + rank], text[: 3 + rank], scale, group=dist.group.WORLD)


def unlike_inputs(name, kind, rank, world):
    """Refused by each process, before the embeddings or ids are sent."""
    image, text, scale, bias = batch()
    options, got = {}, r"\[300, 12\] of torch.float64, \[300, 12\] of torch.float64 with exclude"
    if kind == "exclude":
        options = {"exclude": ids()[:ROWS]} if rank else {}
    else:
        dtypes = {"16 bits": (torch.bfloat16, torch.half), "floats": (torch.float, torch.double)}
        image, text = image.to(dtypes[kind][rank]), text.to(dtypes[kind][rank])
        got = " of {}, .* of {}".format(*dtypes[kind])
    with pytest.raises(RuntimeError, match=f"group: expected one shape and dtype.*{got}"):
        loss_and_gradients(
            name, (image[:ROWS], text[:ROWS], scale, bias), group=dist.group.WORLD, **options
        )


# The gathers are the same above every kernel: one, and the formula. Ids of rows are gathered too.
CHECKS = {
    f"{name}-{backend}{'-excluding' * excluding}": partial(
        mean_over_processes, name, backend, excluding
    )
    for name, backend in CASES
    for excluding in (False, True)
} | {"unlike batches": unlike_batches}
CHECKS |= {
    f"{name}-unlike {kind}": partial(unlike_inputs, name, kind)
    for name in ("clip_loss", "siglip_loss")
    for kind in ("exclude", "16 bits", "floats")
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    return ranks.run(CHECKS, WORLD, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(said, check):
    assert said[check] == ["", ""], "\n".join(said[check])


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
