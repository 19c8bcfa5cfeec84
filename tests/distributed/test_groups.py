"""clip_loss and siglip_loss over processes: each one's part of the whole batch's loss."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import neglog

WORLD, ROWS, FEATURES = 2, 300, 12


def batch():
    generator = torch.Generator().manual_seed(0)
    image, text = (
        torch.nn.functional.normalize(
            torch.randn(WORLD * ROWS, FEATURES, generator=generator, dtype=torch.float64), dim=1
        )
        for _ in range(2)
    )
    return image, text, torch.tensor(10.0, dtype=torch.float64), torch.tensor(-3.0).double()


def loss_and_gradients(name, inputs, **options):
    inputs = [x.clone().requires_grad_() for x in inputs]
    loss = getattr(neglog, name)(*inputs, **options)
    return loss.detach(), torch.autograd.grad(loss, inputs[: 3 if name == "clip_loss" else 4])


def work(rank, name, backend, place, results):
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=WORLD)
    image, text, scale, bias = batch()
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    inputs = (image[mine], text[mine], scale, bias)
    loss, grads = loss_and_gradients(name, inputs, group=dist.group.WORLD, backend=backend)
    refused = ""
    try:
        neglog.clip_loss(image[: 3 + rank], text[: 3 + rank], scale, group=dist.group.WORLD)
    except RuntimeError as error:
        refused = str(error)
    results.put((rank, loss.numpy(), [g.numpy() for g in grads], refused))
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["cython", "torch"])
@pytest.mark.parametrize("name", ["clip_loss", "siglip_loss"])
def test_the_mean_over_processes_is_the_whole(name, backend, tmp_path):
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    arguments = (name, backend, str(tmp_path / "meeting"), results)
    running = mp.start_processes(work, arguments, nprocs=WORLD, join=False, start_method="spawn")
    found = sorted((results.get() for _ in range(WORLD)), key=lambda result: result[0])
    running.join()
    loss, grads = loss_and_gradients(name, batch())
    assert sum(float(result[1]) for result in found) / WORLD == pytest.approx(float(loss))
    for index, whole in enumerate(grads):
        parts = [torch.as_tensor(result[2][index]) / WORLD for result in found]
        mean = torch.cat(parts) if index < 2 else sum(parts)
        torch.testing.assert_close(mean, whole)
    assert all("group: expected one shape" in result[3] for result in found)
