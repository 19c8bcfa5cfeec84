"""The check of each loss that comes before a measurement on a GPU."""

import torch

import neglog
from neglog.bench import smoke

ARGUMENTS = ["--device", "cpu", "--small"]


def test_every_loss_is_right(capsys):
    assert smoke.main(ARGUMENTS) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all right"
    assert {line.partition(",")[0] for line in lines} >= {"cross_entropy", "in place", "padded"}


def test_a_wrong_gradient_and_an_error_are_named(monkeypatch, capsys):
    right = neglog.cross_entropy

    def wrong(x, *arguments, **options):
        if x.shape[1] == 1001 and x.dtype == torch.float32:
            raise RuntimeError("no memory")
        loss = right(x, *arguments, **options)
        if options["backend"] is None and x.dtype == torch.bfloat16 and x.shape[1] == 97:
            x.register_hook(lambda grad: 1.5 * grad)
        return loss

    monkeypatch.setattr(neglog, "cross_entropy", wrong)
    assert smoke.main(ARGUMENTS) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "checked" not in line]
    assert lines[0].startswith("padded, 5 x 97, torch.bfloat16: gradient 1 off by 0.5, more than")
    assert lines[1] == "cross_entropy, 5 x 1001, torch.float32: RuntimeError: no memory"
    assert lines[-1] == f"{len(lines) - 1} wrong"


def test_it_ends_at_an_error_of_the_device(monkeypatch, capsys):
    def broken(*arguments, **options):
        raise RuntimeError("CUDA error: misaligned address")

    monkeypatch.setattr(neglog, "cross_entropy", broken)
    assert smoke.main(ARGUMENTS) == 1
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_without_a_gpu_there_is_nothing_to_check(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert smoke.main([]) == 2
    assert "nothing to check" in capsys.readouterr().err
