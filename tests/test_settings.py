"""neglog.options: set at once, restored at the end of a `with`."""

import threading

import pytest
import torch

import neglog
from neglog import settings
from neglog.ops.nll import remembered


@pytest.fixture(autouse=True)
def fresh():
    remembered.forget()
    yield
    assert settings.gradient == "remembered"


def formed():
    """Whether a forward forms the gradient of its logits."""
    logits = torch.zeros(3, 5, requires_grad=True)
    loss = neglog.cross_entropy(logits, torch.arange(3))
    found = loss.grad_fn.formed is not None
    loss.backward()
    torch.testing.assert_close(logits.grad, (0.2 - torch.eye(3, 5)) / 3)
    return found


def test_gradient():
    for gradient, expected in (("forward", True), ("backward", False), ("remembered", True)):
        with neglog.options(gradient=gradient):
            assert formed() == expected


def test_forward_forms_it_though_no_backward_comes():
    logits, target = torch.zeros(3, 5, requires_grad=True), torch.arange(3)
    with neglog.options(gradient="forward"):
        losses = [neglog.cross_entropy(logits, target) for _ in range(4)]
    assert all(loss.grad_fn.formed is not None for loss in losses)


def test_it_holds_at_once_and_for_all_threads():
    before = neglog.options(gradient="backward")
    found = []
    thread = threading.Thread(target=lambda: found.append(formed()))
    thread.start()
    thread.join()
    assert found == [False]
    assert not formed()
    with before:  # whose end restores what was before it
        pass
    assert formed()


def test_each_with_restores_what_was_before():
    with neglog.options(gradient="backward"):
        with neglog.options(gradient="forward"), neglog.options():
            assert settings.gradient == "forward"
        assert settings.gradient == "backward"
        with pytest.raises(KeyError), neglog.options(gradient="forward"):
            raise KeyError
        assert settings.gradient == "backward"


def test_bad_values():
    with pytest.raises(ValueError, match=r"gradient: expected one of 'remembered', .* got 'never'"):
        neglog.options(gradient="never")
    with pytest.raises(TypeError, match="gradient: expected a str, got bool"):
        neglog.options(gradient=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'grad'"):
        neglog.options(grad="forward")
