"""neglog.integrations.open_clip over processes: each option of open_clip's own losses, in 2 and 3.

3 processes, as then a process has two neighbours.
"""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from neglog import dispatch
from neglog.integrations import open_clip as ours
from tests.support import open_clip_source, ranks
from tests.support.backends import BEST

ROWS, FEATURES = 70, 12
# Before there is a group: torch.distributed.nn, which it imports, keeps the first one for ever.
THEIRS = open_clip_source.losses()
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def inputs(rank):
    """This process's features; scale and bias, which all share."""
    generator = torch.Generator().manual_seed(rank)
    image, text = (
        F.normalize(torch.randn(ROWS, FEATURES, generator=generator), dim=1) for _ in range(2)
    )
    return [x.requires_grad_() for x in (image, text, torch.tensor(14.3), torch.tensor(-9.5))]


def loss_and_gradients(loss, given):
    total = loss(*given)
    return total, _shared(torch.autograd.grad(total, given, allow_unused=True))


def _shared(grads):
    """Of scale and bias, which all processes share, the mean, as a trainer takes it: which part of
    it is whose is the loss's own affair."""
    means = [torch.zeros(()) if x is None else x.clone() for x in grads[2:]]
    for mean in means:
        dist.all_reduce(mean)
    return *grads[:2], *means


def as_theirs(name, options, rank, world):
    """Loss and gradients of each process, by a kernel."""
    given = inputs(rank)
    with dispatch.record() as record:
        found = loss_and_gradients(
            getattr(ours, name)(rank=rank, world_size=world, **options), given
        )
    assert {ran.split(":")[1] for ran in record} == {BEST}
    theirs = getattr(THEIRS, name)(rank=rank, world_size=world, **options)
    torch.testing.assert_close(found, loss_and_gradients(theirs, given), **TOLERANCE)


def unlike_upstreams(name, options, rank, world):
    """A factor that each process has for itself, such as the count of its own words."""
    given = inputs(rank)
    found = [
        _shared(
            torch.autograd.grad(
                (rank + 1) * getattr(module, name)(rank=rank, world_size=world, **options)(*given),
                given,
            )
        )
        for module in (ours, THEIRS)
    ]
    torch.testing.assert_close(*found, **TOLERANCE)


def coca(rank, world):
    image, text, scale, _ = inputs(rank)
    words = torch.randn(ROWS, 4, 30, requires_grad=True)
    labels = torch.randint(30, (ROWS, 4))
    found = []
    for module in (ours, THEIRS):
        made = module.CoCaLoss(2.0, 1.5, local_loss=True, rank=rank, world_size=world)(
            image, text, words, labels, scale
        )
        found.append((made, torch.autograd.grad(sum(made), [image, text, words, scale])))
    torch.testing.assert_close(*found, **TOLERANCE)


def logits_and_labels(options, rank, world):
    """For who asks for them. Without a bias: theirs adds it twice where one matrix is a view of the
    other."""
    image, text, scale, _ = inputs(rank)
    mine, theirs = (
        module.ClipLoss(rank=rank, world_size=world, **options) for module in (ours, THEIRS)
    )
    found = [loss.get_logits(image, text, scale) for loss in (mine, theirs)]
    torch.testing.assert_close(*found, **TOLERANCE)
    rows = len(found[0][0])
    labels = [loss.get_ground_truth(image.device, rows) for loss in (mine, theirs)]
    assert torch.equal(*labels)


def compiled(name, options, rank, world):
    torch.compiler.reset()
    given = inputs(rank)
    loss = getattr(ours, name)(rank=rank, world_size=world, **options)
    whole = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        loss_and_gradients(whole, given), loss_and_gradients(loss, given), **TOLERANCE
    )


def other_ranks(rank, world):
    """Than the group's: labels would be those of another process."""
    given = inputs(rank)
    with pytest.raises(ValueError, match=f"rank: expected {rank}, .* got {rank + 1}"):
        ours.ClipLoss(rank=rank + 1, world_size=world)(*given)
    with pytest.raises(ValueError, match=f"world_size: expected {world}, .* got {world + 1}"):
        ours.SigLipLoss(rank=rank, world_size=world + 1)(*given)


def unlike_rows(options, rank, world):
    """The mean over processes is the loss of all rows; open_clip's gather would wait, or abort."""
    of_all = [[x[: 5 + r] for x in inputs(r)[:2]] for r in range(world)]
    image, text = (torch.cat(parts).detach() for parts in zip(*of_all, strict=True))
    expected = ours.ClipLoss()(image, text, 14.3)
    found = ours.ClipLoss(rank=rank, world_size=world, **options)(*of_all[rank], 14.3).detach()
    dist.all_reduce(found)
    torch.testing.assert_close(found / world, expected, **TOLERANCE)


GATHERS = [
    {"local_loss": local, "gather_with_grad": with_grad}
    for local in (False, True)
    for with_grad in (False, True)
]
CLIP = {
    "-".join(name for name in options if options[name]) or "neither": options for options in GATHERS
}
SIGLIP = {name: {"dist_impl": name} for name in ours.DIST_IMPLS}
CASES = [(f"ClipLoss {name}", "ClipLoss", options) for name, options in CLIP.items()] + [
    (f"SigLipLoss {name}", "SigLipLoss", options) for name, options in SIGLIP.items()
]
AS_THEIRS = {name: partial(as_theirs, kind, options) for name, kind, options in CASES}
CHECKS = {
    2: AS_THEIRS
    | {"unlike upstreams, " + name: partial(unlike_upstreams, *case) for name, *case in CASES}
    | {"logits, " + name: partial(logits_and_labels, options) for name, options in CLIP.items()}
    | {"unlike rows, " + name: partial(unlike_rows, options) for name, options in CLIP.items()}
    # One that gathers constants, one with gradients.
    | {"compiled, " + name: partial(compiled, *case) for name, *case in CASES[1:5]}
    | {"coca": coca, "other ranks": other_ranks},
    3: AS_THEIRS,
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    return {
        world: ranks.run(checks, world, tmp_path_factory.mktemp("ranks"))
        for world, checks in CHECKS.items()
    }


@pytest.mark.parametrize(
    ("world", "check"), [(world, x) for world in CHECKS for x in CHECKS[world]]
)
def test_processes(said, world, check):
    assert said[world][check] == [""] * world, "\n".join(said[world][check])
