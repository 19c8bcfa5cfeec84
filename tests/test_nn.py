"""The modules of neglog.nn, and the queue of negatives."""

import copy
import importlib.util
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import neglog
from tests.support.contrastive_cases import normal, pair


def draw(*positions, vocab=300):
    """Logits (..., C), class indices, and a mask."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(vocab, positions, generator=generator)
    mask = torch.rand(positions, generator=generator) < 0.4
    return torch.randn(*positions, vocab, generator=generator), target, mask


# Losses over classes


def test_module_is_torchs():
    weight = torch.rand(300)
    ours = neglog.nn.CrossEntropyLoss(weight, label_smoothing=0.1, ignore_index=3)
    theirs = torch.nn.CrossEntropyLoss(weight, label_smoothing=0.1, ignore_index=3)
    logits, target, _ = draw(40)
    assert isinstance(ours, torch.nn.CrossEntropyLoss)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(ours(logits, target), theirs(logits, target))
    scaled = neglog.nn.CrossEntropyLoss(reduction="sum", z_loss=0.1, softcap=5.0)
    torch.testing.assert_close(
        scaled(logits, target, num_items=40),
        neglog.cross_entropy(logits, target, num_items=40, z_loss=0.1, softcap=5.0),
    )
    assert "z_loss=0.1" in repr(scaled)


def test_masked_module():
    logits, target, mask = draw(3, 4)
    module = neglog.nn.MaskedCrossEntropyLoss(reduction="sum", label_smoothing=0.2, z_loss=0.1)
    expected = neglog.masked_cross_entropy(
        logits, target, mask, reduction="sum", label_smoothing=0.2, z_loss=0.1
    )
    torch.testing.assert_close(module(logits, target, mask), expected)


@pytest.mark.parametrize("option", ["ignore_index", "size_average", "reduce"])
def test_the_module_refuses_what_a_mask_replaces(option):
    with pytest.raises(TypeError, match=f"{option}: expected none"):
        neglog.nn.MaskedCrossEntropyLoss(**{option: 0})
    assert "ignore_index" not in repr(neglog.nn.MaskedCrossEntropyLoss())


def test_linear_module():
    torch.manual_seed(0)
    module = neglog.nn.LinearCrossEntropyLoss(24, 1000, bias=True, label_smoothing=0.1, z_loss=0.1)
    x, target = torch.randn(300, 24), torch.arange(300)
    expected = neglog.linear_cross_entropy(
        x, module.linear.weight, target, linear_bias=module.linear.bias, label_smoothing=0.1,
        z_loss=0.1,
    )  # fmt: skip
    torch.testing.assert_close(module(x, target), expected)
    theirs = getattr(torch.nn, "LinearCrossEntropyLoss", neglog.nn._Head)(24, 1000, bias=True)
    theirs.load_state_dict(module.state_dict())
    wide = neglog.nn.LinearCrossEntropyLoss(24, 10, out_features=(2,))
    assert wide(x, torch.zeros(300, 2, dtype=torch.int64)).shape == ()


def test_linear_module_for_a_torch_that_has_none(monkeypatch):
    """Before 2.13: the same arguments, state and numbers."""
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyLoss", raising=False)
    spec = importlib.util.spec_from_file_location("neglog_nn_alone", neglog.nn.__file__)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    weight = torch.linspace(0.5, 1.5, 10)
    options = {"out_features": (2,), "bias": True, "weight": weight, "label_smoothing": 0.1}
    old = alone.LinearCrossEntropyLoss(24, 10, **options, reduction="sum", softcap=5.0)
    new = neglog.nn.LinearCrossEntropyLoss(24, 10, **options, reduction="sum", softcap=5.0)
    new.load_state_dict(old.state_dict())
    x, target = torch.randn(30, 24), torch.arange(60).view(30, 2) % 10
    torch.testing.assert_close(old(x, target), new(x, target))
    assert "softcap=5.0" in repr(old)
    for wrong, match in (({"weight": weight[1:]}, "weight"), ({"label_smoothing": 2.0}, "0")):
        with pytest.raises(RuntimeError, match=match):
            alone.LinearCrossEntropyLoss(24, 10, **wrong)


# Losses over embeddings

A, B = (x.detach() for x in pair(20, 5))


LABELS = torch.arange(20) % 4


MODULES = {
    "InfoNCELoss": (
        neglog.nn.InfoNCELoss(0.2, "sum", symmetric=True), (A, B),
        lambda: neglog.info_nce(A, B, temperature=0.2, reduction="sum", symmetric=True),
    ),
    "InfoNCELoss, negatives": (
        neglog.nn.InfoNCELoss(0.2, negative_mode="in_batch"), (A, B, A + 1),
        lambda: neglog.info_nce(A, B, A + 1, 0.2, negative_mode="in_batch"),
    ),
    "CLIPLoss": (neglog.nn.CLIPLoss(options={"workspace_mb": 1}), (A, B, 3.0),
                 lambda: neglog.clip_loss(A, B, 3.0)),
    "SigLIPLoss": (neglog.nn.SigLIPLoss(), (A, B, 3.0, -1.0),
                   lambda: neglog.siglip_loss(A, B, 3.0, -1.0)),
    "NTXentLoss": (neglog.nn.NTXentLoss(0.3, "none"), (A, B),
                   lambda: neglog.nt_xent(A, B, 0.3, "none")),
    "DCLLoss": (neglog.nn.DCLLoss(normalize=False), (A, B),
                lambda: neglog.dcl(A, B, normalize=False)),
    "SupConLoss": (neglog.nn.SupConLoss(0.3), (A, LABELS),
                   lambda: neglog.sup_con(A, LABELS, 0.3)),
}  # fmt: skip


@pytest.mark.parametrize(("module", "arguments", "function"), MODULES.values(), ids=MODULES.keys())
def test_modules(module, arguments, function):
    torch.testing.assert_close(module(*arguments), function())


@pytest.mark.parametrize(
    ("module", "options"), [(neglog.nn.CLIPLoss(), (3.0,)), (neglog.nn.SigLIPLoss(), (3.0, -1.0))]
)
def test_output_dict_of_open_clip(module, options):
    """open_clip's training loop calls its losses with output_dict=True and sums the values."""
    found = module(A, B, *options, output_dict=True)
    torch.testing.assert_close(found, {"contrastive_loss": module(A, B, *options)})


# What differs from batch to batch is given to the call.
@pytest.mark.parametrize(
    ("module", "function", "further"),
    [
        (neglog.nn.CLIPLoss(), neglog.clip_loss, (3.0,)),
        (neglog.nn.SigLIPLoss(), neglog.siglip_loss, (3.0, -1.0)),
        (neglog.nn.NTXentLoss(), neglog.nt_xent, ()),
        (neglog.nn.DCLLoss(), neglog.dcl, ()),
    ],
)
def test_ids_at_the_call(module, function, further):
    ids = torch.arange(20) // 2
    torch.testing.assert_close(
        module(A, B, *further, exclude=ids), function(A, B, *further, exclude=ids)
    )


def test_options_at_the_call_come_first():
    module = neglog.nn.InfoNCELoss(0.2, symmetric=True)
    ids = torch.arange(20) // 2
    torch.testing.assert_close(
        module(A, B, exclude=ids, symmetric=False, temperature=0.5),
        neglog.info_nce(A, B, temperature=0.5, exclude=ids),
    )


@pytest.mark.parametrize("make", [neglog.nn.InfoNCELoss, neglog.nn.NTXentLoss, neglog.nn.DCLLoss])
def test_a_temperature_that_is_learned(make):
    module = make(nn.Parameter(torch.tensor(0.5)))
    assert [name for name, _ in module.named_parameters()] == ["temperature"]
    module(A, B).backward()
    assert module.temperature.grad.isfinite()
    assert "reduction='mean'" in repr(module)


@pytest.mark.parametrize("kind", ["InfoNCELoss", "NTXentLoss", "DCLLoss", "SupConLoss"])
def test_modules_refuse_unknown_options(kind):
    with pytest.raises(TypeError, match=f"{kind}: got an unexpected argument 'foo'"):
        getattr(neglog.nn, kind)(foo=1)
    copied = copy.deepcopy(getattr(neglog.nn, kind)(torch.nn.Parameter(torch.tensor(0.5))))
    assert [p.item() for p in copied.parameters()] == [0.5]


# The queue


# Up to its size, past it, at once, by more than it holds, and by twice as many.
@pytest.mark.parametrize("sizes", [[4, 4, 4], [4, 3, 1, 0, 4], [10], [3, 25, 2], [20, 20]])
def test_the_queue_holds_the_last(sizes):
    queue = neglog.nn.Queue(10, 2)
    pushed = torch.empty(0, 2)
    for seed, size in enumerate(sizes):
        batch = normal(size, 2, seed=seed, dtype=torch.float32)
        queue.push(batch.requires_grad_())
        pushed = torch.cat([pushed, batch.detach()])[-10:]
        assert len(queue) == len(pushed)
        assert {tuple(row) for row in queue().tolist()} == {tuple(row) for row in pushed.tolist()}
        assert not queue().requires_grad


def test_a_queue_of_negatives():
    query, key = pair(8, 4)
    queue = neglog.nn.Queue(6, 4, dtype=torch.float64)
    queue.push(normal(5, 4))
    loss = neglog.info_nce(query, key, queue())
    expected = neglog.info_nce(query, key, normal(5, 4))
    queue.push(key)  # before the backward
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(x, query)[0] for x in (loss, expected)]
    torch.testing.assert_close(*grads)


def test_the_queue_is_saved(tmp_path):
    queue, other = neglog.nn.Queue(5, 3), neglog.nn.Queue(5, 3)
    for seed in range(3):
        queue.push(normal(3, 3, seed=seed))
    torch.save(queue.state_dict(), tmp_path / "queue.pt")
    other.load_state_dict(torch.load(tmp_path / "queue.pt"))
    for each in (queue, other):
        each.push(normal(1, 3, seed=9))
    assert torch.equal(queue(), other())
    assert len(other) == 5
    assert repr(other) == "Queue(size=5, dim=3)"


def test_an_empty_queue_warns():
    """Its loss is 0 for ever if nobody pushes."""
    query, key = pair(8, 4)
    queue = neglog.nn.Queue(6, 4, dtype=torch.float64)
    with pytest.warns(UserWarning, match="Queue: it holds no keys.*push"):
        negatives = queue()
    torch.testing.assert_close(neglog.info_nce(query, key, negatives), (query * 0).sum())


def test_a_queue_saved_with_numbers_beside_its_keys():
    """As state dicts were before the numbers became a buffer, alone and within a module."""
    queue = neglog.nn.Queue(5, 3)
    for seed in range(3):
        queue.push(normal(3, 3, seed=seed))
    filled, following = queue.position.tolist()
    state = {"keys": queue.keys, "_extra_state": {"filled": filled, "next": following}}
    alone, within = neglog.nn.Queue(5, 3), torch.nn.ModuleDict({"queue": neglog.nn.Queue(5, 3)})
    alone.load_state_dict(state)
    within.load_state_dict({f"queue.{name}": value for name, value in state.items()})
    for each in (alone, within["queue"], copy.deepcopy(queue), pickle.loads(pickle.dumps(queue))):
        assert torch.equal(each(), queue())
        each.push(normal(1, 3, seed=9))
        assert each.position.tolist() == [5, 0]
    assert state["_extra_state"]


def test_a_queue_on_a_device_waits_for_others_alone(monkeypatch):
    """Its numbers are read there only after something else than itself has written them."""
    waits, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: waits.append(x) or tolist(x))
    monkeypatch.setattr(neglog.nn, "_costs_no_wait", lambda x: False)
    queue, other = neglog.nn.Queue(5, 3), neglog.nn.Queue(5, 3)
    for each in (queue, other):
        each.push(normal(2, 3))
    waits.clear()
    for _ in range(3):
        queue.push(normal(2, 3))
        assert queue().shape == (len(queue), 3)
    assert not waits
    queue.load_state_dict(other.state_dict())
    assert (len(queue), len(copy.deepcopy(queue)), len(queue.double())) == (2, 2, 2)
    queue.position.copy_(torch.tensor([4, 4]))  # as DistributedDataParallel broadcasts
    assert len(queue) == 4
    with torch.inference_mode():
        queue.push(normal(2, 3))
        assert len(queue) == len(neglog.nn.Queue(5, 3)) + 5
    assert len(queue) == 5


def test_a_compiled_step_with_a_queue():
    """The numbers are those of each call, and nothing is compiled anew for them."""
    torch.compiler.reset()
    queue, plain, graphs = neglog.nn.Queue(5, 3), neglog.nn.Queue(5, 3), []

    def compiled_by(graph, inputs):
        graphs.append(graph)
        return graph

    def step(queue, x):
        queue.push(x * 2)
        return queue().sum() + len(queue)

    compiled = torch.compile(step, backend=compiled_by, dynamic=True)
    for seed in range(12):
        x = normal(1 + seed % 2, 3, seed=seed)
        torch.testing.assert_close(compiled(queue, x), step(plain, x))
        if seed == 6:
            before = len(graphs)
    assert len(graphs) == before


# Up to its size, past it, and more at once than it holds.
@pytest.mark.parametrize("sizes", [[4], [4, 3, 1, 0, 4], [13, 5]])
def test_ids_lie_beside_the_keys_of_a_queue(sizes, tmp_path):
    queue, first = neglog.nn.Queue(6, 1, with_ids=True), 0
    for size in sizes:
        ids = torch.arange(first, first + size, dtype=torch.int32)
        queue.push(ids[:, None].float(), ids=ids)
        first += size
        assert queue.key_ids().tolist() == queue()[:, 0].tolist()
    torch.save(queue.state_dict(), tmp_path / "queue.pt")
    other = neglog.nn.Queue(6, 1, with_ids=True)
    other.load_state_dict(torch.load(tmp_path / "queue.pt"))
    assert torch.equal(other.key_ids(), queue.key_ids())
    assert repr(other) == "Queue(size=6, dim=1, with_ids=True)"


def test_a_queue_with_ids_and_one_without():
    queue, plain = neglog.nn.Queue(6, 4, with_ids=True), neglog.nn.Queue(6, 4)
    keys = torch.zeros(2, 4)
    for error, message, call in (
        (TypeError, "ids: expected a Tensor, .* with_ids, got NoneType", lambda: queue.push(keys)),
        (TypeError, "ids: expected None, got Tensor", lambda: plain.push(keys, torch.arange(2))),
        (RuntimeError, r"ids: expected shape \[2\]", lambda: queue.push(keys, torch.arange(3))),
        (ValueError, "key_ids: expected a Queue made with with_ids=True", plain.key_ids),
    ):
        with pytest.raises(error, match=message):
            call()
    assert len(queue) == len(plain) == 0
    assert list(plain.state_dict()) == ["keys", "position"]


BAD_QUEUES = {
    "no size": (ValueError, "size: expected at least 1, got 0", (0, 3), {}),
    "no features": (ValueError, "dim: expected at least 1, got -1", (5, -1), {}),
    "float": (TypeError, "size: expected an int, got float", (2.5, 2), {}),
    "bool": (TypeError, "size: expected an int, got bool", (True, 2), {}),
    "text": (TypeError, "size: expected an int, got str", ("x", 2), {}),
    "none": (TypeError, "dim: expected an int, got NoneType", (5, None), {}),
    "integers": (TypeError, "dtype: expected a floating-point dtype or None, got torch.int64",
                 (5, 2), {"dtype": torch.long}),
    "no dtype": (TypeError, "dtype: expected a floating-point dtype or None, got 'half'",
                 (5, 2), {"dtype": "half"}),
    "ids": (TypeError, "with_ids: expected a bool, got int", (5, 2), {"with_ids": 1}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"), BAD_QUEUES.values(), ids=BAD_QUEUES.keys()
)
def test_bad_queues(error, message, arguments, options):
    with pytest.raises(error, match=message):
        neglog.nn.Queue(*arguments, **options)


def test_a_queue_of_sizes_of_numpy():
    assert repr(neglog.nn.Queue(np.int64(5), np.int32(3))) == "Queue(size=5, dim=3)"


BAD_KEYS = {
    "list": (TypeError, r"keys: expected a Tensor, got list", [1.0]),
    "integers": (RuntimeError, r"keys: expected a floating-point dtype", torch.zeros(2, 4).long()),
    "features": (RuntimeError, r"keys: expected shape \(N, 4\), got \[2, 3\]", torch.zeros(2, 3)),
    "one key": (RuntimeError, r"keys: expected shape \(N, 4\), got \[4\]", torch.zeros(4)),
}


@pytest.mark.parametrize(("error", "message", "keys"), BAD_KEYS.values(), ids=BAD_KEYS.keys())
def test_bad_keys(error, message, keys):
    queue = neglog.nn.Queue(8, 4)
    with pytest.raises(error, match=message):
        queue.push(keys)
    assert len(queue) == 0


def test_a_queue_takes_its_own_keys():
    queue = neglog.nn.Queue(4, 2)
    queue.push(torch.arange(6.0).view(3, 2))
    queue.push(queue.keys[:3])
    assert queue.keys.tolist() == [[2, 3], [4, 5], [4, 5], [0, 1]]
