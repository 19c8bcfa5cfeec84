"""nll as eager calls on CUDA take it: on a GPU and, by the emulated ops, on the CPU.

The gradient must be, bit for bit, what two passes give, and the host must not wait for the device.
"""

import threading

import pytest
import torch
import torch.nn.functional as F

import neglog
from neglog import dispatch, settings, torch_state
from neglog.ops.nll import eager, eager_cuda
from neglog.ops.nll.schema import MEAN, NONE, SUM, Options
from tests.csrc.test_nll import problem
from tests.support.cuda_devices import Waits, real_of
from tests.support.nll_tensors import in_checkpoint

PLAIN = Options(MEAN, -100, 0.0, 1.0, 0.0, 0.0)
ALL = Options(SUM, -100, 0.2, 0.7, 5.0, 0.1)
# Short rows, and rows that are held in shared memory.
SHAPES = [(6, 40), (3, 9001)]


@pytest.fixture(autouse=True)
def ops(device, monkeypatch):
    monkeypatch.setattr(eager_cuda, "ops", device.ops)
    monkeypatch.setattr(eager_cuda, "_records", {})
    if device.name == "cpu":
        monkeypatch.setattr(torch_state, "eager_on_cuda", torch_state.eager_on_cpu)
        monkeypatch.setattr(torch_state, "eager_on_cpu", lambda x: False)
    return device.ops


@pytest.fixture(params=SHAPES, ids=str)
def inputs(request, device):
    """Logits that want a gradient, and a target."""
    logits, target, _ = problem(request.param, torch.float32, False, device.name)
    return logits.contiguous().requires_grad_(), target


def loss_of(logits, target, options=PLAIN, weight=None):
    return eager.nll(logits, target, weight, None, None, options, False, "").loss


def by_two_passes(ops, logits, target, upstream=1.0, options=PLAIN, weight=None):
    given = (logits.detach(), target, weight, None)
    loss, lse, low, total, *_ = ops.nll(*given, None, *options, False, "")
    upstream = torch.full_like(loss, upstream)
    return loss, ops.nll_backward(upstream, None, None, *given, lse, low, None, total, *options, "")


def gradient(loss, logits, upstream=1.0, **how):
    return torch.autograd.grad(loss, logits, torch.full_like(loss, upstream), **how)[0]


def equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def remembered_upstream():
    (record,) = eager_cuda._records.values()
    return float(record.remembered[0])


@pytest.mark.parametrize("kind", ["indices", "weight", "probabilities"])
@pytest.mark.parametrize("options", [PLAIN, ALL], ids=str)
def test_the_bits_are_those_of_two_passes(ops, device, dtype, options, kind):
    logits, target, weight = problem((5, 257), dtype, kind == "probabilities", device.name)
    logits.requires_grad_()
    given = (options, weight if kind == "weight" else None)
    for upstream in (1.0, 1 / 3, 1 / 3, 65536.0):
        loss = loss_of(logits, target, *given)
        assert isinstance(loss.grad_fn, eager_cuda.CudaNLL._backward_cls)
        assert loss.dtype == real_of(dtype)
        expected, gradients = by_two_passes(ops, logits, target, upstream, *given)
        equal(loss.detach(), expected)
        equal(gradient(loss, logits, upstream), gradients)


@pytest.mark.parametrize("upstream", [1.0, 0.25, 65536.0])
def test_it_is_formed_for_the_last_upstream(ops, inputs, upstream):
    logits, _ = inputs
    for step in range(3):
        loss = loss_of(*inputs)
        formed = loss.grad_fn.formed
        before, address = formed.clone(), formed.data_ptr()
        del formed
        with dispatch.record() as ran:
            found = gradient(loss, logits, upstream)
        assert ran == ["nll_backward:cuda"]
        expected = by_two_passes(ops, *inputs, upstream)[1]
        equal(found, expected)
        assert found.data_ptr() == address
        equal(before, expected if step else by_two_passes(ops, *inputs)[1])
        assert remembered_upstream() == upstream


# None was a step's, and what it is for is left as it was.
@pytest.mark.parametrize("upstream", [0.0, float("inf"), float("nan")])
def test_what_is_not_remembered(ops, inputs, upstream):
    logits, _ = inputs
    gradient(loss_of(*inputs), logits, 4.0)
    found = gradient(loss_of(*inputs), logits, upstream)
    equal(found, by_two_passes(ops, *inputs, upstream)[1])
    assert remembered_upstream() == 4.0


def test_upstreams_that_change_at_each_step(ops, inputs):
    """None is expected any more, until one is that of the step before."""
    logits, _ = inputs
    for upstream, expects in ((2, 1), (3, 2), (4, None), (4, None), (4, 4)):
        loss = loss_of(*inputs)
        read = loss.grad_fn.kept[-1]
        equal(read, torch.full_like(read, float("nan") if expects is None else expects))
        equal(gradient(loss, logits, upstream), by_two_passes(ops, *inputs, upstream)[1])


def test_a_second_backward(ops, inputs):
    logits, _ = inputs
    loss = loss_of(*inputs)
    upstreams = (1.0, 1.0, 3.0, 1.0)
    found = [gradient(loss, logits, upstream, retain_graph=True) for upstream in upstreams]
    for one, upstream in zip(found, upstreams, strict=True):
        equal(one, by_two_passes(ops, *inputs, upstream)[1])
    assert len({one.data_ptr() for one in found}) == 4
    gradient(loss, logits)
    with pytest.raises(RuntimeError, match="second time"):
        gradient(loss, logits)


def test_what_is_handed_over_is_the_users_alone(ops, inputs):
    logits, _ = inputs
    loss = loss_of(*inputs)
    gradient(loss, logits, retain_graph=True).fill_(7)
    equal(gradient(loss, logits), by_two_passes(ops, *inputs)[1])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forwards_before_their_backwards(ops, inputs, order):
    """The second forward's upstream is remembered when the first one's backward comes."""
    logits, _ = inputs
    losses = [loss_of(*inputs), loss_of(*inputs)]
    for which in order:
        upstream = (2.0, -3.0)[which]
        equal(gradient(losses[which], logits, upstream), by_two_passes(ops, *inputs, upstream)[1])
    assert remembered_upstream() == (2.0, -3.0)[order[-1]]


def test_forwards_without_a_backward_end_it(inputs):
    logits, _ = inputs
    losses = [loss_of(*inputs) for _ in range(4)]
    assert [loss.grad_fn.formed is not None for loss in losses] == [True, True, False, False]
    found = [gradient(loss, logits) for loss in losses]
    for other in found[1:]:
        equal(other, found[0])
    equal(losses[3], losses[0])
    assert loss_of(*inputs).grad_fn.formed is not None


def test_options(ops, inputs):
    logits, _ = inputs
    expected = by_two_passes(ops, *inputs)[1]
    with neglog.options(gradient="backward"):
        loss = loss_of(*inputs)
        assert loss.grad_fn.formed is None
        equal(gradient(loss, logits), expected)
    with neglog.options(gradient="forward"):
        losses = [loss_of(*inputs) for _ in range(settings.PATIENCE["remembered"] + 1)]
    for loss in losses:
        assert loss.grad_fn.formed is not None
        equal(gradient(loss, logits), expected)


def test_while_a_graph_is_captured(ops, inputs, monkeypatch):
    """Nothing that has memory of the graph is remembered, and the host does not wait."""
    logits, target = inputs
    monkeypatch.setattr(torch_state, "capturing", lambda device: True)
    monkeypatch.setattr(torch_state, "plain_upstream", lambda grad: True)  # Waits is a mode
    rest = (target, None, None, None, PLAIN)

    def run(upstream):
        with Waits():
            loss = eager_cuda.CudaNLL.apply(logits, rest)
            formed = loss.grad_fn.formed.clone()
            return formed, gradient(loss, logits, upstream)

    ones, twos = (by_two_passes(ops, *inputs, upstream)[1] for upstream in (1.0, 2.0))
    for _ in range(2):
        equal(run(2.0), (ones, twos))
        assert not eager_cuda._records
    monkeypatch.setattr(torch_state, "capturing", lambda device: False)
    equal(run(2.0), (ones, twos))
    monkeypatch.setattr(torch_state, "capturing", lambda device: True)
    equal(run(2.0), (twos, twos))  # the record was made before


def test_losses_that_are_alike_share_a_record(device):
    """By device, dtype and reduction, whatever the shape; made once, also by many threads."""
    made = []

    def run(shape, dtype, options):
        logits, target, _ = problem(shape, dtype, False, device.name)
        logits.requires_grad_()
        loss = loss_of(logits, target, options)
        made.append(loss.grad_fn.record)
        gradient(loss, logits)

    for shape in SHAPES:
        run(shape, torch.float32, PLAIN)
    assert made[0] is made[1]
    run(SHAPES[0], torch.float32, PLAIN._replace(reduction=SUM))
    run(SHAPES[0], torch.bfloat16, PLAIN)
    assert len(set(map(id, made))) == 3
    made.clear()
    given = (SHAPES[0], torch.float64, PLAIN)
    threads = [threading.Thread(target=run, args=given) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4
    assert len(set(map(id, made))) == 1


def test_create_graph(inputs):
    logits, target = (x.detach().double() if x.is_floating_point() else x for x in inputs)
    logits.requires_grad_()
    loss = loss_of(logits, target)
    (first,) = torch.autograd.grad(loss, logits, create_graph=True)
    own = torch.autograd.grad(F.cross_entropy(logits, target), logits, create_graph=True)[0]
    torch.testing.assert_close(first, own)
    seconds = [torch.autograd.grad(x.square().sum(), logits)[0] for x in (first, own)]
    torch.testing.assert_close(*seconds)


def test_a_batch_of_upstreams(ops, inputs):
    logits, _ = inputs
    upstreams = torch.tensor([1.0, 0.5, -2.0], device=logits.device)
    loss = loss_of(*inputs)
    (found,) = torch.autograd.grad(loss, logits, upstreams, is_grads_batched=True)
    for one, upstream in zip(found, upstreams.tolist(), strict=True):
        torch.testing.assert_close(one, by_two_passes(ops, *inputs, upstream)[1])


def test_hooks_of_tensors_see_and_change_what_flows(ops, inputs):
    logits, target = inputs
    for _ in range(2):
        x = logits * 1
        loss = loss_of(x, target)
        loss.register_hook(lambda upstream: 3 * upstream)
        x.register_hook(lambda grad: 2 * grad)
        equal(gradient(loss, logits), 2 * by_two_passes(ops, *inputs, 3.0)[1])
    assert remembered_upstream() == 3.0


@pytest.mark.parametrize("changed", ["logits", "target", "weight"])
def test_what_was_changed_in_place_before_the_backward_is_an_error(inputs, changed):
    logits, target = inputs
    weight = torch.ones(logits.shape[1], device=logits.device)
    given = {"logits": logits * 1, "target": target, "weight": weight}
    loss = loss_of(**given)
    given[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(loss, logits)


def test_nothing_is_formed_where_hooks_take_the_logits_away(ops, inputs):
    logits, target = inputs
    expected = by_two_passes(ops, *inputs)[1]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        loss = loss_of(*inputs)
    assert loss.grad_fn.formed is None
    equal(gradient(loss, logits), expected)
    found, formed = in_checkpoint(lambda x: loss_of(x, target), logits)
    equal(found, expected)
    assert set(formed) == {None}
    assert not eager_cuda._records


def test_what_the_registered_op_takes(inputs):
    """Losses of rows, statistics, gradients of targets, columns apart, no gradient."""
    logits, target = inputs
    assert eager_cuda.takes(logits, target, PLAIN, False)
    assert not eager_cuda.takes(logits, target, PLAIN._replace(reduction=NONE), False)
    assert not eager_cuda.takes(logits, target, PLAIN, True)
    learned = torch.softmax(logits.detach(), 1).requires_grad_()
    assert not eager_cuda.takes(logits, learned, PLAIN, False)
    assert not eager_cuda.takes(logits.t(), target, PLAIN, False)
    assert not eager_cuda.takes(logits.detach(), target, PLAIN, False)
    with torch.no_grad():
        assert not eager_cuda.takes(logits, target, PLAIN, False)
    with Waits():
        assert not eager_cuda.takes(logits, target, PLAIN, False)
    taken = []
    torch.func.grad(lambda x: taken.append(eager_cuda.takes(x, target, PLAIN, False)) or x.sum())(
        logits.detach()
    )
    assert taken == [False]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
def test_nothing(device, shape):
    logits = torch.zeros(shape, device=device.name, requires_grad=True)
    target = torch.full(shape[:1], -100, device=device.name)
    for create_graph in (False, True):
        loss = loss_of(logits, target)
        assert loss.isnan()
        found = gradient(loss, logits, 2.0, create_graph=create_graph)
        assert found.shape == shape


# A loss scale; the gradient of a half is divided by the rows after it.
@pytest.mark.parametrize("name", ["cross_entropy", "masked_cross_entropy"])
def test_the_losses_take_it(device, dtype, name):
    logits, target, _ = problem((6, 40), dtype, False, device.name)
    x = logits.contiguous().requires_grad_()
    mask = () if name == "cross_entropy" else (target != -100,)
    wide = x.detach().double().requires_grad_()
    scale = 1024.0
    (F.cross_entropy(wide, target) * scale).backward()
    for _ in range(2):
        x.grad = None
        loss = getattr(neglog, name)(x, target, *mask)
        made_by = loss.grad_fn if dtype == real_of(dtype) else loss.grad_fn.next_functions[0][0]
        assert made_by.formed is not None
        (loss.to(real_of(dtype)) * scale).backward()
        precision = {torch.bfloat16: 5e-3, torch.float16: 1e-3}.get(dtype, 1e-5)
        assert (x.grad.double() - wide.grad).norm() <= precision * wide.grad.norm()
    assert remembered_upstream() == scale
