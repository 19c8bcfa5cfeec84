"""Softmax regression on NumPy arrays: neglog's kernels without torch.

python examples/numpy_only.py
"""

import sys

import numpy as np

from neglog import kernels


def main() -> None:
    rng = np.random.default_rng(0)
    samples, features, classes = 512, 64, 1000
    truth = rng.normal(size=(features, classes)).astype(np.float32)
    x = rng.normal(size=(samples, features)).astype(np.float32)
    target = (x @ truth).argmax(axis=1)

    weight = np.zeros((features, classes), np.float32)
    for step in range(51):
        logits = x @ weight
        # Loss and gradient in one pass over the logits; of a mean, so each row's loss counts
        # 1 / samples. Without out=logits the gradient is a new array.
        result, grad = kernels.nll_forward_backward(
            logits, target, grad_scale=1 / samples, out=logits, stats=True
        )
        assert result.correct is not None  # as stats=True asks
        weight -= 20 * x.T @ grad
        if step % 10 == 0:
            loss = result.loss.sum() / result.total_weight
            print(f"step {step:2}  loss {loss:.4f}  correct {result.correct.mean():.0%}")

    # In two calls, where the gradient of each row's loss is known only after the losses.
    logits = x @ weight
    result = kernels.nll_forward(logits, target)
    grad = kernels.nll_backward(result.loss / result.loss.sum(), result, logits, target)
    print(f"in two: loss {result.loss.mean():.4f}; torch imported: {'torch' in sys.modules}")


if __name__ == "__main__":
    main()
