"""Fused models over two processes, beside the same wrapped and unfused: losses and parameters."""

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from neglog import dispatch
from tests.support import ranks, tiny_models
from tests.support.fused_models import fuse

CLASSES, STEPS = 512, 3


def built(name, **changes):
    model, _ = tiny_models.build(name, vocab_size=CLASSES, **changes)
    return model


def batch(name, rank, step):
    ids, labels = tiny_models.tokens(CLASSES, masked=name == "bert", seed=10 * step + rank)
    return {"input_ids": ids, "labels": labels}


def plain_step(model, optimizer, given):
    loss = model(**given).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def trained(name, rank, model, step=plain_step):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = [step(model, optimizer, batch(name, rank, number)) for number in range(STEPS)]
    return losses, [whole(p) for p in model.parameters()]


def whole(parameter):
    parameter = parameter.detach()
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).clone()


def check(
    name,
    wrap,
    order,
    rank,
    world,
    *,
    step=plain_step,
    tolerance=1e-4,
    of_parameters=1e-5,
    **changes,
):
    """order: whether fuse comes before the wrapper or after it."""
    expected = trained(name, rank, wrap(built(name, **changes)), step)
    model = built(name, **changes)
    model = wrap(fuse(model)) if order == "before" else fuse(wrap(model))
    with dispatch.record() as ran:
        found = trained(name, rank, model, step)
    assert sum(op.startswith("linear_nll:") for op in ran) >= STEPS
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=of_parameters)


def ddp(**options):
    return partial(DistributedDataParallel, **options)


def ddp_of_logits(model, **options):
    return DistributedDataParallel(Backbone(model), **options)


def fsdp1(model):
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def fsdp2(model, head=False, **options):
    for layer in model.model.layers:
        fully_shard(layer, **options)
    if head:
        fully_shard(model.lm_head, **options)
    return fully_shard(model, **options)


def compiled_ddp(model):
    model = DistributedDataParallel(model)
    return torch.compile(model, backend="aot_eager")


def accumulated(model, optimizer, given):
    """Two backwards, the first without a reduction."""
    with model.no_sync():
        model(**given).loss.backward()
    return plain_step(model, optimizer, given)


class Backbone(nn.Module):
    """DistributedDataParallel around a user's own module, which returns logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def forward(self, input_ids, labels):
        return self.model(input_ids=input_ids).logits


def own_loss(model, optimizer, given):
    logits = model(**given)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), given["labels"].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def by_accelerate(rank, world):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0", ACCELERATE_USE_CPU="1",
    )  # fmt: skip
    results = []
    for fused in (False, True):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = fuse(built("llama")) if fused else built("llama")
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        losses = []
        with dispatch.record() as ran:
            for number in range(4):
                with accelerator.accumulate(model):
                    loss = model(**batch("llama", rank, number)).loss
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                    losses.append(accelerator.gather(loss.detach()))
        assert any(op.startswith("linear_nll:") for op in ran) == fused
        results.append(losses)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=0)


def weights_are_sharded(rank, world):
    """What is tested is sharded."""
    model = fsdp2(built("llama"), head=True)
    assert model.lm_head.weight.to_local().shape[0] == CLASSES // world
    assert dist.get_world_size() == world


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
CHECKS = {
    **{
        f"DDP, {name}, fused {order}": partial(check, name, ddp(), order)
        for name in ("llama", "bert")
        for order in ("before", "after")
    },
    "DDP, tied": partial(check, "gpt2", ddp(), "before"),
    "DDP, find_unused_parameters": partial(
        check, "llama", ddp(find_unused_parameters=True), "before"
    ),
    "DDP, static_graph": partial(check, "llama", ddp(static_graph=True), "before"),
    "DDP, no_sync": partial(check, "llama", ddp(), "before", step=accumulated),
    "DDP, logits returned": partial(
        check, "llama", ddp_of_logits, "after", step=own_loss
    ),
    "DDP, logits returned, find_unused_parameters": partial(
        check, "llama", partial(ddp_of_logits, find_unused_parameters=True),
        "after", step=own_loss,
    ),
    "DDP, compiled": partial(check, "llama", compiled_ddp, "before"),
    "FSDP1, before": partial(check, "llama", fsdp1, "before"),
    "FSDP1, after": partial(check, "llama", fsdp1, "after"),
    "FSDP2, head in the root, before": partial(check, "llama", fsdp2, "before"),
    "FSDP2, head in the root, after": partial(check, "llama", fsdp2, "after"),
    "FSDP2, head of its own, before": partial(check, "llama", partial(fsdp2, head=True), "before"),
    "FSDP2, head of its own, after": partial(check, "llama", partial(fsdp2, head=True), "after"),
    "FSDP2, bfloat16": partial(
        check, "llama", partial(fsdp2, mp_policy=BF16), "before", tolerance=2e-2, of_parameters=5e-3
    ),
    "accelerate": by_accelerate,
    "sharded": weights_are_sharded,
}  # fmt: skip


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each process said of each check: all run once."""
    return ranks.run(CHECKS, 2, tmp_path_factory.mktemp("group"), seconds=240)


@pytest.mark.parametrize("name", CHECKS)
def test_over_two_processes(name, said):
    assert said[name] == ["", ""]
