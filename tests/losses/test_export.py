"""torch.export with dynamic rows: no traced Python compares a size, so one graph serves all."""

import pytest
import torch

import neglog

ROWS = 40
X = torch.randn(ROWS, 9, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(ROWS) % 9
HEAD = X[:9].clone()

CALLS = {
    "cross_entropy": (lambda x, t: neglog.cross_entropy(x, t), (X, LABELS)),
    "cross_entropy, none": (
        lambda x, t: neglog.cross_entropy(x, t, reduction="none"), (X, LABELS),
    ),
    "cross_entropy, statistics": (
        lambda x, t: neglog.cross_entropy(x, t, return_stats=True).entropy, (X, LABELS),
    ),
    "masked_cross_entropy": (
        lambda x, t: neglog.masked_cross_entropy(x, t, t > 2), (X, LABELS),
    ),
    "linear_cross_entropy": (
        lambda x, t: neglog.linear_cross_entropy(x, HEAD, t), (X, LABELS),
    ),
    "info_nce": (lambda x, y: neglog.info_nce(x, y), (X, 2 * X)),
    "info_nce, symmetric": (
        lambda x, y: neglog.info_nce(x, y, symmetric=True, label_smoothing=0.1), (X, 2 * X),
    ),
    "info_nce, statistics": (
        lambda x, y: neglog.info_nce(x, y, return_stats=True).entropy, (X, 2 * X),
    ),
    "info_nce, exclude": (
        lambda x, ids: neglog.info_nce(x, 2 * x, exclude=ids), (X, LABELS),
    ),
    "clip_loss": (
        lambda x, y: neglog.clip_loss(x, y, 3.0, options={"workspace_mb": 0.5}), (X, 2 * X),
    ),
    "siglip_loss": (lambda x, y: neglog.siglip_loss(x, y, 3.0, -1.0), (X, 2 * X)),
    "nt_xent": (lambda x, y: neglog.nt_xent(x, y), (X, 2 * X)),
    "dcl": (lambda x, y: neglog.dcl(x, y), (X, 2 * X)),
    "sup_con": (lambda x, labels: neglog.sup_con(x, labels), (X, LABELS)),
}  # fmt: skip


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *given):
        return self.function(*given)


# strict traces by Dynamo, the other runs the Python with symbolic sizes: each has its own view of
# what a comparison with a size is. 2 rows are the fewest that may be dynamic; at 600 rows
# all similarities no longer fit in clip_loss's workspace.
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("function", "given"), CALLS.values(), ids=CALLS.keys())
def test_rows_are_dynamic(function, given, strict):
    rows = torch.export.Dim("rows", min=2)
    shapes = (tuple({0: rows} for _ in given),)
    exported = torch.export.export(Module(function), given, dynamic_shapes=shapes, strict=strict)
    module = exported.module()
    for count in (2, 600):
        times = count // ROWS + 1
        inputs = [x.repeat(times, *[1] * (x.dim() - 1))[:count] for x in given]
        torch.testing.assert_close(module(*inputs), function(*inputs), equal_nan=True)
