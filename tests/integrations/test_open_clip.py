"""neglog.integrations.open_clip in one process, against open_clip's own losses."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from neglog import dispatch
from neglog.integrations import open_clip as ours
from tests.support import open_clip_source
from tests.support.allocations import largest_allocation
from tests.support.backends import BEST
from tests.support.processes import python

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
# One tile, several tiles and a remainder.
ROWS = [1, 7, 300]


def inputs(rows, dtype=torch.float32, seed=0):
    """Features, scale and bias, which learn."""
    torch.manual_seed(seed)
    image, text = (F.normalize(torch.randn(rows, 16), dim=1).to(dtype) for _ in range(2))
    return [x.requires_grad_() for x in (image, text, torch.tensor(14.3), torch.tensor(-9.5))]


def loss_and_gradients(loss, given):
    """Of the first loss, with the gradients that it gives; None for none."""
    total = loss(*given)
    return total, torch.autograd.grad(total, given, allow_unused=True)


def kernels_of(record):
    """The backends that ran."""
    return {ran.split(":")[1] for ran in record}


def check_alike(loss, theirs, given, **tolerance):
    """By a kernel, and as theirs."""
    with dispatch.record() as record:
        found = loss_and_gradients(loss, given)
    assert kernels_of(record) == {BEST}
    expected = loss_and_gradients(theirs, given)
    torch.testing.assert_close(found, expected, **(tolerance or TOLERANCE))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_clip(rows, with_bias):
    given = inputs(rows)[: 4 if with_bias else 3]
    check_alike(ours.ClipLoss(), open_clip_source.losses().ClipLoss(), given)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("options", [{}, {"chunk_size": 64}, {"dist_impl": "gather"}])
def test_siglip(rows, options):
    theirs = open_clip_source.losses().SigLipLoss()
    check_alike(ours.SigLipLoss(**options), theirs, inputs(rows))


def test_siglip_in_chunks_of_16_bits_is_float32():
    """As open_clip's main branch has it, which adds the chunks' sums up in float32."""
    given = inputs(40, torch.bfloat16)
    assert ours.SigLipLoss()(*given).dtype == torch.bfloat16
    assert ours.SigLipLoss(chunk_size=8)(*given).dtype == torch.float32


def test_siglip_in_chunks_has_no_more_rows_in_memory():
    """Here 64 of 2048."""
    given = inputs(2048)
    loss = ours.SigLipLoss(chunk_size=64)
    assert largest_allocation(lambda: loss(*given).backward()) <= 4 * 64 * 2048


@pytest.mark.parametrize("clip_weight", [0, 1.5])
@pytest.mark.parametrize("output_dict", [False, True])
def test_coca(clip_weight, output_dict):
    image, text, scale, _ = inputs(7)
    # As its task gives them: all words but the last, whose rows do not lie one after another.
    words = torch.randn(7, 6, 50).requires_grad_()
    labels = torch.randint(1, 50, (7, 5))
    labels[:, 3:] = 0
    found = []
    for module in (ours, open_clip_source.losses()):
        loss = module.CoCaLoss(2.0, clip_weight, pad_id=0)
        with dispatch.record() as record:
            made = loss(image, text, words[:, :-1], labels, scale, output_dict=output_dict)
            total = sum(made.values() if output_dict else made)
            learn = [image, text, scale, words]
            gradients = torch.autograd.grad(total, learn, allow_unused=True)
        found.append((made, gradients))
        assert kernels_of(record) == ({BEST} if module is ours else set())
    torch.testing.assert_close(*found, **TOLERANCE)


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_output_dict(name):
    given = inputs(7)
    found = getattr(ours, name)()(*given, output_dict=True)
    expected = getattr(open_clip_source.losses(), name)()(*given, output_dict=True)
    torch.testing.assert_close(found, expected, **TOLERANCE)


# A bias that open_clip's SigLipLoss demands.
@pytest.mark.parametrize("name", ["ClipLoss", "CoCaLoss", "SigLipLoss"])
def test_their_arguments_in_their_order(name):
    for function in ("__init__", "forward"):
        mine, theirs = (
            [(x.name, x.default) for x in inspect.signature(kind).parameters.values()]
            for kind in (
                getattr(getattr(module, name), function)
                for module in (ours, open_clip_source.losses())
            )
        )
        if name == "SigLipLoss":
            mine = [x for x in mine if x[0] not in ("chunk_size", "logit_bias")]
            theirs = [x for x in theirs if x[0] != "logit_bias"]
        assert mine == theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_other_dtypes(name, dtype):
    """Against theirs in float64; the loss in the dtype of theirs."""
    given = inputs(50, dtype)
    theirs = getattr(open_clip_source.losses(), name)()
    loss = getattr(ours, name)()(*given)
    assert loss.dtype == theirs(*given).dtype
    tolerance = 1e-10 if dtype == torch.float64 else 8e-3
    exact = theirs(*[x.double() for x in given])
    torch.testing.assert_close(loss.double(), exact, rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_autocast(name):
    given = inputs(50)
    with torch.autocast("cpu", torch.bfloat16):
        mine = loss_and_gradients(getattr(ours, name)(), given)
    theirs = loss_and_gradients(getattr(open_clip_source.losses(), name)(), given)
    assert mine[0].dtype == torch.float32
    torch.testing.assert_close(mine[0], theirs[0], rtol=0.02, atol=0)
    torch.testing.assert_close(mine[1][0], theirs[1][0], rtol=0.1, atol=0.02)


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_compiles_whole(name):
    torch.compiler.reset()
    loss, given = getattr(ours, name)(), inputs(20)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        loss_and_gradients(compiled, given), loss_and_gradients(loss, given), **TOLERANCE
    )


@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_shape_of_scale_and_bias(shape):
    """FSDP2 makes them (1,)."""
    for name in ("ClipLoss", "SigLipLoss"):
        image, text, scale, bias = inputs(9)
        given = [image, text, *(x.detach().reshape(shape).requires_grad_() for x in (scale, bias))]
        check_alike(getattr(ours, name)(), getattr(open_clip_source.losses(), name)(), given)


def test_logits_and_labels_for_who_asks():
    image, text, scale, bias = inputs(5)
    mine, theirs = ours.ClipLoss(cache_labels=True), open_clip_source.losses().ClipLoss()
    for given in ((image, text, scale), (image, text, scale, bias)):
        torch.testing.assert_close(mine.get_logits(*given), theirs.get_logits(*given))
    labels = mine.get_ground_truth(image.device, 5)
    assert torch.equal(labels, theirs.get_ground_truth(image.device, 5))
    assert mine.get_ground_truth(image.device, 5) is labels
    assert len(mine.get_ground_truth(image.device, 6)) == 6
    mine, theirs = ours.SigLipLoss(), open_clip_source.losses().SigLipLoss()
    torch.testing.assert_close(
        mine.get_logits(image, text, scale, bias), theirs.get_logits(image, text, scale, bias)
    )
    for negative_only in (False, True):
        given = (image.device, image.dtype, 5, negative_only)
        assert torch.equal(mine.get_ground_truth(*given), theirs.get_ground_truth(*given))


class Towers(nn.Module):
    """What open_clip's CLIP answers with output_dict."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(12, 8), nn.Linear(12, 8)
        self.logit_scale, self.logit_bias = (
            nn.Parameter(torch.tensor(2.6)),
            nn.Parameter(-torch.ones(())),
        )

    def forward(self, image, text):
        return {
            "image_features": F.normalize(self.image(image), dim=-1),
            "text_features": F.normalize(self.text(text), dim=-1),
            "logit_scale": self.logit_scale.exp(),
            "logit_bias": self.logit_bias,
        }


class Task(nn.Module):
    """What open_clip's CLIPTask and SigLIPTask (main branch) do with a loss that they were given:
    its outputs by name, output_dict=True, and the sum of all that ends in _loss."""

    def __init__(self, model, *, loss):
        super().__init__()
        self.trainable_module, self.loss = model, loss

    def forward(self, batch):
        outputs = self.trainable_module(image=batch["image"], text=batch["text"])
        losses = self.loss(**outputs, output_dict=True)
        losses["loss"] = sum(x for name, x in losses.items() if name.endswith("_loss"))
        return losses


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_inside_a_task(name):
    torch.manual_seed(0)
    theirs = Task(Towers(), loss=getattr(open_clip_source.losses(), name)())
    mine = copy.deepcopy(theirs)
    mine.loss = getattr(ours, name)()
    batch = {"image": torch.randn(30, 12), "text": torch.randn(30, 12)}
    found = []
    for task in (mine, theirs):
        losses = task(batch)
        losses["loss"].backward()
        found.append((losses, [x.grad for x in task.parameters()]))
    # Sums of 30 gradients, some of which cancel.
    torch.testing.assert_close(*found, rtol=1e-5, atol=5e-6)
    assert mine.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("loss", [ours.ClipLoss(True), ours.SigLipLoss(), ours.CoCaLoss(2.0, 1.0)])
def test_pickled_and_copied(loss):
    for made in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert {x: vars(made)[x] for x in vars(loss) if x[0] != "_"} == {
            x: vars(loss)[x] for x in vars(loss) if x[0] != "_"
        }


def test_refused():
    given = inputs(5)
    with pytest.raises(NotImplementedError, match="use_horovod: expected False, got True"):
        ours.ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match=r"dist_impl: expected one of .* got 'ring'"):
        ours.SigLipLoss(dist_impl="ring")
    for kind in (ours.ClipLoss, ours.SigLipLoss):
        with pytest.raises(RuntimeError, match=r"world_size: .* 2 processes, got no process group"):
            kind(world_size=2)(*given)
    with pytest.raises(RuntimeError, match="text_features: expected 5 rows"):
        ours.ClipLoss()(given[0], given[1][:4], given[2])


@pytest.mark.parametrize("name", ["get_logits", "get_ground_truth"])
def test_another_step_is_refused(name):
    """forward would silently not call it."""
    with pytest.raises(TypeError, match=rf"Mine\.{name}: expected no other one"):
        type("Mine", (ours.ClipLoss,), {name: lambda self: None})


def test_nothing_of_open_clip_is_imported():
    code = "import sys, neglog.integrations.open_clip; print('open_clip' in sys.modules)"
    done = python(code)
    assert done.stdout.strip() == "False", done.stderr
