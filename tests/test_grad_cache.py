"""cached_step: the gradient of a large batch, by parts."""

import random
from collections import UserDict, defaultdict
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import neglog
from tests.support.contrastive_cases import normal


def encoder(dropout=0.0, seed=0):
    torch.manual_seed(seed)
    parts = (nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4))
    return nn.Sequential(*parts).double()


def step(parameters, run):
    """Loss and gradients of a run."""
    parameters = list(parameters)
    for parameter in parameters:
        parameter.grad = None
    loss = run()
    return loss, [None if p.grad is None else p.grad.clone() for p in parameters]


def whole(encode, inputs, loss):
    """The step without a cache."""
    encoders = [encode] * len(inputs) if callable(encode) else encode
    value = loss(*(one(x) for one, x in zip(encoders, inputs, strict=True)))
    value.backward()
    return value.detach()


# One row, whole chunks, and a rest; chunks of one row, of several, of all, and of more.
@pytest.mark.parametrize("rows", [1, 12, 13])
@pytest.mark.parametrize("chunk_size", [1, 4, 12, 64])
def test_the_gradient_is_that_of_the_whole_batch(rows, chunk_size):
    encode = encoder()
    inputs = (normal(rows, 6), normal(rows, 6, seed=1))
    results = [
        step(encode.parameters(), run)
        for run in (
            lambda: neglog.cached_step(encode, inputs, neglog.info_nce, chunk_size=chunk_size),
            lambda: whole(encode, inputs, neglog.info_nce),
        )
    ]
    torch.testing.assert_close(*results)
    assert not results[0][0].requires_grad


def test_gradients_are_added():
    encode = encoder()
    inputs = (normal(8, 6), normal(8, 6, seed=1))
    once = step(encode.parameters(), lambda: neglog.cached_step(encode, inputs, neglog.nt_xent))
    neglog.cached_step(encode, inputs, neglog.nt_xent)
    twice = [p.grad for p in encode.parameters()]
    torch.testing.assert_close(twice, [2 * g for g in once[1]])


def test_dropout_draws_the_same_again():
    """By hand: each chunk's first run draws in turn; its gradient is that of these draws."""
    encode = encoder(dropout=0.5)
    inputs = (normal(10, 6), normal(10, 6, seed=1))

    def by_hand():
        embeddings = [torch.cat([encode(part) for part in x.split(4)]) for x in inputs]
        loss = neglog.info_nce(*embeddings)
        loss.backward()
        return loss.detach()

    results, after = [], []
    for run in (by_hand, lambda: neglog.cached_step(encode, inputs, neglog.info_nce, chunk_size=4)):
        torch.manual_seed(5)
        results.append(step(encode.parameters(), run))
        after.append(torch.rand(1))  # the second run has taken nothing from the generator
    torch.testing.assert_close(*results)
    assert torch.equal(*after)


@pytest.mark.parametrize("frozen", [False, True])
def test_two_towers(frozen):
    image, text = encoder(seed=1), encoder(seed=2)
    text.requires_grad_(not frozen)
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    parameters = [*image.parameters(), *text.parameters(), scale]
    inputs = (normal(9, 6), normal(9, 6, seed=1))

    def loss(image, text):
        return neglog.clip_loss(image, text, scale.exp())

    results = [
        step(parameters, run)
        for run in (
            lambda: neglog.cached_step([image, text], inputs, loss, chunk_size=2),
            lambda: whole([image, text], inputs, loss),
        )
    ]
    torch.testing.assert_close(*results)
    assert results[0][1][-1] is not None
    assert all((p.grad is None) == frozen for p in text.parameters())


class Batch(NamedTuple):
    tokens: torch.Tensor
    mask: torch.Tensor


@pytest.mark.parametrize("kind", ["dict", "list", "tuple", "named", "nested"])
def test_inputs_of_parts(kind):
    tower = encoder()
    make = {
        "dict": lambda x, y: {"x": x, "y": y},
        "list": lambda x, y: [x, y],
        "tuple": lambda x, y: (x, y),
        "named": Batch,
        "nested": lambda x, y: {"both": [x, {"y": y}]},
    }[kind]
    take = {
        "dict": lambda given: (given["x"], given["y"]),
        "named": lambda given: (given.tokens, given.mask),
        "nested": lambda given: (given["both"][0], given["both"][1]["y"]),
    }.get(kind, lambda given: tuple(given))

    def encode(given):
        x, y = take(given)
        return tower(x) * y[:, None]

    inputs = [make(normal(7, 6, seed=s), normal(7, seed=s)) for s in (1, 2)]
    results = [
        step(tower.parameters(), run)
        for run in (
            lambda: neglog.cached_step(encode, inputs, neglog.info_nce, chunk_size=3),
            lambda: whole(encode, inputs, neglog.info_nce),
        )
    ]
    torch.testing.assert_close(*results)


def test_inputs_of_different_lengths():
    encode = encoder()
    inputs = (normal(7, 6), normal(7, 6, seed=1), normal(11, 6, seed=2))
    results = [
        step(encode.parameters(), run)
        for run in (
            lambda: neglog.cached_step(encode, inputs, neglog.info_nce, chunk_size=3),
            lambda: whole(encode, inputs, neglog.info_nce),
        )
    ]
    torch.testing.assert_close(*results)


def test_a_loss_that_leaves_an_input_alone():
    encode = encoder()
    inputs = (normal(4, 6), normal(4, 6, seed=1), normal(4, 6, seed=2))
    results = [
        step(
            encode.parameters(),
            lambda run=run: run(encode, inputs, lambda a, b, c: neglog.dcl(a, b)),
        )
        for run in (neglog.cached_step, whole)
    ]
    torch.testing.assert_close(*results)


def test_a_parallel_encoder_whose_last_chunk_learns_nothing_synchronises_too():
    class Parallel(nn.Module):
        silent, reduced = False, False

        def __init__(self):
            super().__init__()
            self.learns, self.frozen = encoder(), encoder(seed=1).requires_grad_(False)

        def forward(self, given):
            made = getattr(self, *given)(*given.values())
            if made.requires_grad and not self.silent:
                made.register_hook(lambda grad: setattr(self, "reduced", True))
            return made

        @contextmanager
        def no_sync(self):
            self.silent = True
            yield
            self.silent = False

    encode = Parallel()
    inputs = ({"learns": normal(6, 6)}, {"frozen": normal(6, 6, seed=1)})
    parameters = list(encode.learns.parameters())
    found = step(
        parameters, lambda: neglog.cached_step(encode, inputs, neglog.info_nce, chunk_size=2)
    )
    assert encode.reduced
    torch.testing.assert_close(
        found, step(parameters, lambda: whole(encode, inputs, neglog.info_nce))
    )


def test_a_scaled_backward():
    encode = encoder()
    inputs = (normal(6, 6), normal(6, 6, seed=1))
    plain = step(encode.parameters(), lambda: neglog.cached_step(encode, inputs, neglog.info_nce))
    scaled = step(
        encode.parameters(),
        lambda: neglog.cached_step(
            encode, inputs, neglog.info_nce, backward=lambda loss: (1024 * loss).backward()
        ),
    )
    torch.testing.assert_close(scaled, (plain[0], [1024 * g for g in plain[1]]))


def test_a_parallel_encoder_synchronises_once():
    class Parallel(nn.Sequential):
        apart = 0

        def no_sync(self):
            self.apart += 1
            return torch.enable_grad()

    encode = Parallel(encoder())
    inputs = (normal(6, 6), normal(6, 6, seed=1))
    neglog.cached_step(encode, inputs, neglog.info_nce, chunk_size=2)
    assert encode.apart == 5  # of six chunks


def test_without_gradients_there_is_the_loss_alone():
    encode, inputs = encoder(), (normal(6, 6), normal(6, 6, seed=1))
    runs = []
    with torch.no_grad():
        found = neglog.cached_step(
            lambda x: runs.append(x) or encode(x), inputs, neglog.info_nce, chunk_size=4
        )
    assert len(runs) == 4  # of two chunks each input, once
    assert all(x.grad is None for x in encode.parameters())
    torch.testing.assert_close(found, whole(encode, inputs, neglog.info_nce))


def drawn_by_python(tower):
    return lambda x: tower(x) * random.choice([0.9, 1.1])


def drawn_by_numpy(tower):
    generator = np.random.default_rng(0)
    return lambda x: tower(x) + torch.from_numpy(generator.normal(size=(len(x), 4))) * 0.1


def drawn_by_its_own_generator(tower):
    generator = torch.Generator().manual_seed(0)
    return lambda x: tower(x * torch.empty_like(x).bernoulli_(0.5, generator=generator))


def changing_itself(tower):
    return nn.Sequential(tower, nn.utils.spectral_norm(nn.Linear(4, 4)).double())


def first_nan_then_not(tower):
    runs = []
    return lambda x: tower(x) * (float("nan") if runs.append(x) or len(runs) < 3 else 1)


def of_another_shape(tower):
    runs = []
    return lambda x: tower(x)[:, : 4 if runs.append(x) or len(runs) < 3 else 3]


UNLIKE = [
    drawn_by_python, drawn_by_numpy, drawn_by_its_own_generator, changing_itself,
    first_nan_then_not, of_another_shape,
]  # fmt: skip


@pytest.mark.parametrize("make", UNLIKE, ids=lambda make: make.__name__)
def test_a_second_run_unlike_the_first_is_refused(make):
    """Before the gradient of its chunk is added, which would be that of another loss."""
    random.seed(1)
    tower = encoder()
    with pytest.raises(RuntimeError, match=r"encode: expected .* first"):
        neglog.cached_step(make(tower), (normal(6, 6), normal(6, 6, seed=1)), neglog.info_nce)
    assert all(x.grad is None for x in tower.parameters())


def test_the_error_names_the_likely_causes():
    with pytest.raises(RuntimeError, match=r"of their norm away.*random.*Generator.*spectral_norm"):
        neglog.cached_step(drawn_by_numpy(encoder()), (normal(6, 6),), torch.sum)


# The noise of another order of sums, where the dtype is seen and where it is inside alone.
@pytest.mark.parametrize(
    ("dtype", "noise", "after"),
    [(torch.float64, 1e-9, None), (torch.float32, 3e-5, None), (torch.bfloat16, 0.02, None),
     (torch.float16, 0.004, None), (torch.bfloat16, 0.02, torch.float32)],
)  # fmt: skip
def test_the_noise_of_another_kernel_is_none(dtype, noise, after):
    tower, calls = encoder().to(dtype), []

    def encode(x):
        calls.append(x)
        return (tower(x) * (1 + (noise if len(calls) == 1 else 0))).to(after or dtype)

    neglog.cached_step(encode, (normal(6, 6).to(dtype),), lambda x: x.float().square().sum())
    assert len(calls) == 2
    calls.clear()
    noise *= 30
    with pytest.raises(RuntimeError, match="of their norm away"):
        neglog.cached_step(encode, (normal(6, 6).to(dtype),), lambda x: x.float().square().sum())


def test_infinite_and_undefined_embeddings_equal_themselves():
    tower = encoder()
    special = torch.tensor([[torch.nan], [torch.inf], [1.0]]).double()
    loss = neglog.cached_step(lambda x: tower(x) * special, (normal(3, 6),), torch.sum)
    assert loss.isnan()


def test_no_rows():
    encode = encoder()
    inputs = (normal(0, 6), normal(0, 6))
    loss = neglog.cached_step(encode, inputs, neglog.info_nce)
    assert loss.isnan()


X = torch.zeros(4, 6)
BAD_STEPS = {
    "tensor": (TypeError, "inputs: expected a sequence", (encoder(), X), {}),
    "nothing": (TypeError, "inputs: expected .* argument of loss, got none", (encoder(), ()), {}),
    "no backward": (TypeError, "backward: expected a function, got int", (encoder(), (X,)),
                    {"backward": 1}),
    "text": (TypeError, "inputs: expected tensors, or dicts or lists of them, got str",
             (encoder(), (X, ["a"])), {}),
    "chunk": (ValueError, "chunk_size: expected at least 1, got 0", (encoder(), (X,)),
              {"chunk_size": 0}),
    "encoders": (ValueError, "encode: expected 2, one an input, got 1", ([encoder()], (X, X)), {}),
    "rows": (ValueError, r"inputs: expected tensors with one number of rows, got shapes \[\[4, 6\]",
             (encoder(), ([X, X[:2]],)), {}),
    "embeddings": (RuntimeError, r"encode: expected 4 embeddings, got \[2, 6\]",
                   (lambda x: x[:2], (X,)), {}),
    "chunk's type": (TypeError, "chunk_size: expected an int, got float", (encoder(), (X,)),
                     {"chunk_size": 2.5}),
    "no encoder": (TypeError, "encode: expected a function or several, got NoneType", (None, (X,)),
                   {}),
    "integers": (RuntimeError, r"encode: expected floating-point embeddings, got torch\.int64",
                 (lambda x: x.long(), (X,)), {}),
    "a graph": (ValueError, "inputs: expected tensors that require no grad",
                (encoder(), (X.clone().requires_grad_(),)), {}),
    "chunk's truth": (TypeError, "chunk_size: expected an int, got bool", (encoder(), (X,)),
                      {"chunk_size": True}),
    "one is no encoder": (TypeError, "encode: expected functions, got NoneType among them",
                          ([encoder(), None], (X, X)), {}),
    "chunks' features": (RuntimeError, r"encode: expected one shape .* \[3, 6\] of .* and \[1, 1\]",
                         (lambda x: x[:, : 6 if len(x) == 3 else 1], (X,)), {"chunk_size": 3}),
    "chunks' dtypes": (RuntimeError, r"encode: expected one .* and \[1, 6\] of torch.float64",
                       (lambda x: x if len(x) == 3 else x.double(), (X,)), {"chunk_size": 3}),
    "no tensor": (TypeError, "encode: expected a Tensor of embeddings, got tuple",
                  (lambda x: (x,), (X,)), {}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"), BAD_STEPS.values(), ids=BAD_STEPS.keys()
)
def test_bad_steps(error, message, arguments, options):
    with pytest.raises(error, match=message):
        neglog.cached_step(*arguments, neglog.info_nce, **options)


WITHOUT_GRAPH = {
    "no_grad": lambda tower: torch.no_grad()(tower),
    "detach": lambda tower: lambda x: tower(x).detach(),
    "frozen": lambda tower: tower.requires_grad_(False),
}


@pytest.mark.parametrize("make", WITHOUT_GRAPH.values(), ids=WITHOUT_GRAPH.keys())
def test_embeddings_without_a_graph(make):
    """An error where nothing learns, as a backward has it; not where the loss does."""
    inputs, scale = (normal(6, 6), normal(6, 6, seed=1)), torch.ones((), requires_grad=True)
    with pytest.raises(RuntimeError, match="encode: expected embeddings with a graph"):
        neglog.cached_step(make(encoder()), inputs, neglog.info_nce, chunk_size=4)

    def learning(x, y):
        return neglog.clip_loss(x, y, scale)

    neglog.cached_step(make(encoder()), inputs, learning, chunk_size=4)
    assert scale.grad.abs() > 0


def test_no_loss():
    with pytest.raises(TypeError, match="loss: expected a function, got NoneType"):
        neglog.cached_step(encoder(), (X.double(),), None)


@pytest.mark.parametrize(("got", "made"), [("float", lambda x: 1.0), (r"shape \[4\]", torch.sum)])
def test_a_loss_that_is_no_number(got, made):
    def loss(x):
        return made(x, 1) if made is torch.sum else made(x)

    with pytest.raises(TypeError, match=f"loss: expected a function that returns .* got {got}"):
        neglog.cached_step(encoder(), (X.double(),), loss)


def test_encoders_may_be_a_list_of_modules():
    towers = nn.ModuleList([encoder(), encoder(seed=1)])
    inputs = (normal(6, 6), normal(6, 6, seed=1))
    results = [
        step(towers.parameters(), run)
        for run in (
            lambda: neglog.cached_step(towers, inputs, neglog.info_nce, chunk_size=4),
            lambda: whole(list(towers), inputs, neglog.info_nce),
        )
    ]
    torch.testing.assert_close(*results)


def test_a_mapping_keeps_its_type():
    class Named(UserDict):  # as a tokenizer's BatchEncoding
        @property
        def ids(self):
            return self["ids"]

    encode = encoder()
    inputs = (Named({"ids": normal(6, 6)}), Named({"ids": normal(6, 6, seed=1)}))
    found = neglog.cached_step(lambda x: encode(x.ids), inputs, neglog.info_nce, chunk_size=4)
    expected = whole(lambda x: encode(x.ids), inputs, neglog.info_nce)
    torch.testing.assert_close(found, expected)
    bare = tuple(defaultdict(list, x) for x in inputs)
    found = neglog.cached_step(lambda x: encode(x["ids"]), bare, neglog.info_nce, chunk_size=4)
    torch.testing.assert_close(found, expected)
