"""Contrastive losses under torch's transformations, copied and over processes' gathers."""

import copy

import pytest
import torch
import torch.distributed as dist

import neglog
from neglog import dispatch
from tests.support.backends import BACKENDS

LOSSES = {
    "info_nce": lambda x, y: neglog.info_nce(x, y, 0.2 * torch.ones(3, 5), symmetric=False),
    "symmetric": lambda x, y: neglog.info_nce(x, y, symmetric=True),
    "clip_loss": lambda x, y: neglog.clip_loss(x, y, 2.0),
    "siglip_loss": lambda x, y: neglog.siglip_loss(x, y, 2.0, -1.0),
    "nt_xent": lambda x, y: neglog.nt_xent(x, y),
    "dcl": lambda x, y: neglog.dcl(x, y),
    "sup_con": lambda x, y: neglog.sup_con(x + y, torch.arange(x.shape[0]) // 2),
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    with dispatch.use(request.param):
        yield request.param


@pytest.fixture(params=LOSSES.values(), ids=LOSSES.keys())
def loss(request):
    return request.param


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def x_and_y(*shape):
    dtype = torch.float32
    return draw(*shape).to(dtype), draw(*shape, seed=1).to(dtype)


def test_vmap_of_values_and_gradients(backend, loss):
    x, y = x_and_y(3, 8, 5)
    expected = torch.stack([loss(*pair) for pair in zip(x, y, strict=True)])
    torch.testing.assert_close(torch.func.vmap(loss)(x, y), expected)
    grads = torch.func.vmap(torch.func.grad(loss))(x, y)
    expected = torch.stack([torch.func.grad(loss)(*pair) for pair in zip(x, y, strict=True)])
    torch.testing.assert_close(grads, expected)


def test_a_transform_compiles_whole(loss):
    """Kernels have no formula there, so torch's own functions run whatever the size."""
    torch.compiler.reset()
    x, y = x_and_y(600, 5)
    compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), torch.func.grad(loss)(x, y), rtol=1e-4, atol=1e-6)
    mapped = torch.compile(torch.func.vmap(loss), fullgraph=True, backend="aot_eager")
    x, y = x_and_y(2, 9, 5)
    torch.testing.assert_close(mapped(x, y), torch.func.vmap(loss)(x, y))


def test_export_of_any_number_of_rows(loss):
    class Loss(torch.nn.Module):
        def forward(self, x, y):
            return loss(x, y)

    rows = torch.export.Dim("rows", min=2, max=200)
    program = torch.export.export(Loss(), x_and_y(20, 5), dynamic_shapes=({0: rows}, {0: rows}))
    x, y = x_and_y(31, 5)
    torch.testing.assert_close(program.module()(x, y), loss(x, y))


def test_bits_repeat(backend, loss):
    x, y = (part.requires_grad_() for part in x_and_y(512, 5))
    found = [(made := loss(x, y), *torch.autograd.grad(made, (x, y))) for _ in range(8)]
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


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
def test_a_group_of_one_changes_nothing(group, backend, loss):
    x, y = draw(6, 5).requires_grad_(), draw(6, 5, seed=1).requires_grad_()

    def derivatives(group):
        first = torch.autograd.grad(loss(x, y, group), (x, y), create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, y))

    torch.testing.assert_close(derivatives(group), derivatives(None))
    of_x = torch.func.grad(lambda x: loss(x, y, group))(x)
    torch.testing.assert_close(of_x, derivatives(None)[0])


@pytest.mark.parametrize("loss", GROUPED.values(), ids=GROUPED.keys())
def test_a_group_compiles_whole(group, loss):
    torch.compiler.reset()
    x, y = x_and_y(6, 5)
    compiled = torch.compile(lambda x, y: loss(x, y, group), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), loss(x, y, None))


@pytest.mark.parametrize("kind", [neglog.nn.CLIPLoss, neglog.nn.SigLIPLoss])
def test_a_module_with_a_group_is_copied(group, kind):
    module = kind(group=group)
    made = copy.deepcopy(torch.nn.Sequential(module))[0]
    assert made is not module
    assert made.group is group


@pytest.mark.parametrize("kind", ["InfoNCELoss", "NTXentLoss", "DCLLoss", "SupConLoss"])
def test_modules_refuse_unknown_options(kind):
    with pytest.raises(TypeError, match=f"{kind}: got an unexpected argument 'foo'"):
        getattr(neglog.nn, kind)(foo=1)
    copied = copy.deepcopy(getattr(neglog.nn, kind)(torch.nn.Parameter(torch.tensor(0.5))))
    assert [p.item() for p in copied.parameters()] == [0.5]
