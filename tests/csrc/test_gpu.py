"""What only a GPU can show: graphs, streams, devices, memory. Collected where there is one."""

import pytest
import torch
import torch.nn.functional as F

import neglog
from neglog import dispatch
from neglog.ops.nll import eager_cuda
from neglog.tiles import gemm

DEVICES = [f"cuda:{index}" for index in range(torch.cuda.device_count())]


def draw(*shape, device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()


def labels(rows, classes, device, ignored=False):
    target = torch.arange(rows, device=device) * 7919 % classes
    return torch.where(target % 5 == 0, -100, target) if ignored else target


def cross_entropy(x, w, target):
    return neglog.cross_entropy(x @ w.t(), target)


def masked(x, w, target):
    return neglog.masked_cross_entropy(x @ w.t(), target.clamp(min=0), target != -100)


def linear(x, w, target):
    return neglog.linear_cross_entropy(x, w, target, options={"workspace_mb": 0.5})


def clip(x, w, target):
    return neglog.clip_loss(F.normalize(x), F.normalize(w), 20.0)


def siglip(x, w, target):
    return neglog.siglip_loss(F.normalize(x), F.normalize(w), 20.0, -5.0)


def counted(x, w, target):
    return neglog.cross_entropy(x @ w.t(), target, num_items=1234)


def linear_counted(x, w, target):
    return neglog.linear_cross_entropy(x, w, target, num_items=1234)


def weighted(x, w, target):
    return neglog.info_nce(x, w, w.flip(0)[:1200], 2.0, hard_negative_weight=0.5)


def of_labels(x, w, target):
    return neglog.sup_con(torch.cat([x, w]), torch.cat([target, target]) % 50, 0.2)


LOSSES = (of_labels, cross_entropy, masked, linear, clip, siglip, counted, linear_counted, weighted)


@pytest.fixture(params=LOSSES, ids=lambda loss: loss.__name__)
def loss(request):
    return request.param


def inputs(device, seed=0):
    """Large enough for the kernels, and the linear loss's tiles: 2400 x 2400."""
    return (
        draw(2400, 32, device=device, seed=seed),
        draw(2400, 32, device=device, seed=seed + 1),
        labels(2400, 2400, device, ignored=True),
    )


def value_and_gradients(loss, x, w, target):
    made = loss(x, w, target)
    return made, *torch.autograd.grad(made, (x, w), allow_unused=True, materialize_grads=True)


def test_a_graph_is_captured_and_replayed(loss):
    x, w, target = inputs("cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            value_and_gradients(loss, x, w, target)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = value_and_gradients(loss, x, w, target)
    other = inputs("cuda", seed=5)
    with torch.no_grad():
        for held, new in zip((x, w), other[:2], strict=True):
            held.copy_(new)
    target.copy_(target.roll(3))
    graph.replay()
    expected = value_and_gradients(loss, *other[:2], target)
    # While a graph is captured all rows are multiplied: other shapes, other roundings.
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-6)


def test_another_stream_is_waited_for_by_nobody_else(loss):
    x, w, target = inputs("cuda")
    expected = value_and_gradients(loss, x, w, target)
    late = tuple(part.detach().clone() for part in inputs("cuda", seed=5))
    late[2].copy_(target.roll(1))
    for part in late[:2]:
        part.requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)  # on this stream alone: what ran elsewhere would be early
        with torch.no_grad():
            for held, new in zip(late, (x, w, target), strict=True):
                held.copy_(new)
        found = value_and_gradients(loss, *late)
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_runs_its_own(loss, device):
    with dispatch.record() as ran:
        found = value_and_gradients(loss, *inputs(device))
    assert {one.rpartition(":")[2] for one in ran} == {"cuda"}
    assert {str(part.device) for part in found} == {device}
    expected = value_and_gradients(loss, *inputs("cpu"))
    torch.testing.assert_close([part.cpu() for part in found], list(expected), rtol=1e-4, atol=1e-5)


def test_bits_repeat(loss):
    runs = [value_and_gradients(loss, *inputs("cuda")) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(runs[0], other, strict=True))


# Rows of one block's shared memory and of clusters of two to eight; in both sizes of a number.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab", [32000, 50257, 128256, 262144])
def test_rows_on_chip(dtype, vocab):
    """In place, where a row lies in the shared memory of one block or of a cluster."""
    logits = draw(300, vocab, device="cuda", dtype=dtype).detach()
    target = labels(300, vocab, "cuda", ignored=True)
    leaf = logits.clone().requires_grad_()
    expected = torch.autograd.grad(F.cross_entropy(leaf.double(), target), leaf)[0]
    ours = logits.clone().requires_grad_()
    loss = neglog.cross_entropy(ours * 1, target, inplace_backward=True)
    (found,) = torch.autograd.grad(loss, ours)
    # Apart, as the target's own gradient is most of the norm.
    counted = target != -100
    own = F.one_hot(target.clamp(min=0), vocab).bool() & counted[:, None]
    tolerance = 4e-3 if dtype == torch.bfloat16 else 1e-5
    for part in (own, ~own & counted[:, None]):
        one, other = found[part].double(), expected[part].double()
        assert (one - other).norm() <= tolerance * other.norm()
    assert not found[~counted].any()


def logits_of(rows, vocab, dtype=torch.bfloat16, seed=0):
    """A leaf, a target, and a function: the gradient for an upstream, by the registered ops."""
    x = draw(rows, vocab, device="cuda", dtype=dtype, seed=seed)
    target = labels(rows, vocab, "cuda", ignored=True)

    def expected(upstream):
        with neglog.options(gradient="backward"):
            loss = neglog.cross_entropy(x, target, loss_dtype=torch.float32)
        return torch.autograd.grad(loss, x, torch.full_like(loss, upstream))[0]

    return x, target, expected


# In a cache, in one block's shared memory, in that of a cluster.
@pytest.mark.parametrize("vocab", [1000, 30522, 128256])
def test_the_host_waits_for_no_upstream(vocab):
    """Nobody asks the device whether a gradient is handed over or formed again."""
    x, target, expected = logits_of(300, vocab)
    for upstream in (1.0, 1.0, 0.25, 0.25, 65536.0):
        grad = torch.tensor(upstream, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = neglog.cross_entropy(x, target, loss_dtype=torch.float32)
            (found,) = torch.autograd.grad(loss, x, grad)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(found, expected(upstream))


@pytest.mark.parametrize("remembers", [False, True])
def test_a_graph_whose_upstream_changes(remembers, monkeypatch):
    """A replay reads what the last one remembered. Without a call before the capture nothing is."""
    x, target, expected = logits_of(300, 30522)
    upstream = torch.ones((), device="cuda")

    def step():
        loss = neglog.cross_entropy(x, target, loss_dtype=torch.float32)
        return torch.autograd.grad(loss, x, upstream)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    if not remembers:
        monkeypatch.setattr(eager_cuda, "_records", {})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    assert bool(eager_cuda._records) == remembers
    for value in (1.0, 0.5, 0.5, -3.0, 7.0, 7.0, 7.0):
        upstream.fill_(value)
        graph.replay()
        assert torch.equal(found, expected(value))


def test_a_module_whose_forward_and_backward_are_graphs():
    x, target, expected = logits_of(300, 30522, torch.float32)

    class Loss(torch.nn.Module):
        def forward(self, x):
            return neglog.cross_entropy(x, target)

    graphed = torch.cuda.make_graphed_callables(Loss(), (x.detach().clone().requires_grad_(),))
    for upstream in (1.0, 0.5, 0.5):
        (found,) = torch.autograd.grad(graphed(x) * upstream, x)
        assert torch.equal(found, expected(upstream))


def test_streams_that_share_what_is_remembered():
    """Each has an upstream of its own, and begins with what the others left."""
    x, target, expected = logits_of(64, 128256)
    upstreams = (1.0, 0.5, -2.0)
    wanted = [expected(upstream) for upstream in upstreams]
    streams = [torch.cuda.Stream() for _ in upstreams]
    torch.cuda.synchronize()
    found = [[] for _ in upstreams]
    for _ in range(10):
        for stream, upstream, into in zip(streams, upstreams, found, strict=True):
            with torch.cuda.stream(stream):
                loss = neglog.cross_entropy(x, target, loss_dtype=torch.float32)
                into += torch.autograd.grad(loss, x, torch.full_like(loss, upstream))
    torch.cuda.synchronize()
    for one, many in zip(wanted, found, strict=True):
        assert all(torch.equal(one, other) for other in many)


def test_forward_and_backward_need_one_gradient_of_memory():
    x, target, expected = logits_of(512, 128256)
    expected(1.0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    neglog.cross_entropy(x, target).backward()
    assert torch.cuda.max_memory_allocated() - before <= x.nbytes + (1 << 20)


# The two products of the linear backward, in both dtypes whose sums are wider than they are.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["add_product", "add_outer"])
def test_products_add_up_in_float32(name, dtype):
    """Two tiles, of columns that start at a line of the cache and end anywhere."""
    s, x = draw(300, 1001, device="cuda", dtype=dtype), draw(300, 65, device="cuda", dtype=dtype)
    w = draw(1001, 65, device="cuda", dtype=dtype)
    s, x, w = s.detach(), x.detach(), w.detach()
    wide = torch.empty(300, 1024, device="cuda", dtype=dtype)[:, :1001].copy_(s)
    other, add = (w, gemm.add_product) if name == "add_product" else (x, gemm.add_outer)
    one = s.double() @ w.double() if name == "add_product" else s.double().t() @ x.double()
    out = torch.full(one.shape, torch.nan, device="cuda")
    for round, expected in enumerate((one, 2 * one)):
        add(wide, other, out, round == 0)
        assert (out.double() - expected).norm() <= 1e-5 * expected.norm()


def test_linear_needs_one_tile_of_memory():
    x = draw(4096, 512, device="cuda", dtype=torch.bfloat16)
    w = draw(64000, 512, device="cuda", dtype=torch.bfloat16)
    target = labels(4096, 64000, "cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    neglog.linear_cross_entropy(x, w, target, options={"workspace_mb": 64}).backward()
    extra = torch.cuda.max_memory_allocated() - before
    gradients = x.nbytes + w.nbytes
    # The tile, the weight's gradient in float32 while tiles add to it, and what a step rounds.
    assert extra <= (64 << 20) + 2 * w.nbytes + 3 * gradients
