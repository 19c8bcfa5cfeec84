"""Embeddings, arguments of every contrastive loss, and every form of info_nce."""

import torch
import torch.nn.functional as F

from tests.support.contrastive_formulas import INF

TILES = {"workspace_mb": 0.1}  # many of them, none of which is kept


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def pair(rows=300, features=24, dtype=torch.float64, unit=False):
    """Embeddings of two views that resemble each other, requiring grad."""
    first = normal(rows, features)
    second = first + normal(rows, features, seed=1)
    if unit:
        first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
    return tuple(x.to(dtype).requires_grad_() for x in (first, second))


def labels_of(rows):
    """About four of each, and one that is alone."""
    labels = torch.arange(rows) * 7919 % max(1, rows // 4)
    labels[:1] = rows
    return labels


def gradients(loss, inputs, **options):
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return torch.autograd.grad(loss, inputs, upstream, **options)


def _number(value, dtype):
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def case(name, rows=300, features=24, dtype=torch.float64, temperature=0.1):
    """Arguments of the loss `name`: tensors that require grad, but for labels."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    tau = _number(temperature, real)
    if name in ("clip_loss", "siglip_loss"):
        views = pair(rows, features, dtype, unit=True)
        scale = _number(1 / temperature, real)
        bias = (_number(-3.0, real),) if name == "siglip_loss" else ()
        return (*views, scale, *bias)
    if name == "sup_con":
        return pair(rows, features, dtype)[0], labels_of(rows), tau
    if name == "info_nce":
        return (*pair(rows, features, dtype), None, tau)
    return (*pair(rows, features, dtype), tau)


def learned(arguments):
    return [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]


LOSSES = ("info_nce", "clip_loss", "siglip_loss", "nt_xent", "dcl", "sup_con")


OF_ONE_NUMBER = ("clip_loss", "siglip_loss")


FORMS = {
    "in batch": {},
    "symmetric": {"symmetric": True},
    "queue": {"negatives": "unpaired"},
    "paired": {"negatives": "paired"},
    "in batch and further": {"negatives": "in_batch"},
    "queue, weight": {"negatives": "unpaired", "hard_negative_weight": 0.7},
    "further, weight": {"negatives": "in_batch", "hard_negative_weight": -1.5},
    "queue, weights": {"negatives": "unpaired", "weights": "M"},
    "further, weights": {"negatives": "in_batch", "weights": "M"},
    "paired, weights": {"negatives": "paired", "weights": "M"},
    "paired, own weights": {"negatives": "paired", "weights": "NM"},
    "exclude": {"exclude": True},
    "exclude, symmetric": {"exclude": True, "symmetric": True},
    "exclude, further": {"exclude": True, "negatives": "in_batch", "weights": "M"},
    "smoothing": {"label_smoothing": 0.2},
    "smoothing, symmetric": {"label_smoothing": 0.2, "symmetric": True},
    "smoothing, queue": {"label_smoothing": 0.2, "negatives": "unpaired"},
    "smoothing, queue, weight": {
        "label_smoothing": 0.9, "negatives": "unpaired", "hard_negative_weight": 0.7
    },
    "smoothing, further, weight": {
        "label_smoothing": 1.0, "negatives": "in_batch", "hard_negative_weight": 0.7
    },
    "smoothing, paired": {"label_smoothing": 0.2, "negatives": "paired"},
    "dot products": {"normalize": False, "symmetric": True},
}  # fmt: skip


TEMPERATURES = ("number", "tensor", "of each row")


def temperature_of(kind, rows, dtype=torch.float64):
    return {
        "number": 0.3,
        "tensor": torch.tensor(0.3, dtype=dtype, requires_grad=True),
        "of each row": torch.linspace(0.1, 0.6, rows, dtype=dtype).requires_grad_(),
    }[kind]


def form(name, temperature="tensor", rows=90, keys=70, features=9, dtype=torch.float64):
    """Inputs (query, positive_key, negative_keys, temperature) and options of info_nce."""
    options = dict(FORMS[name])
    mode = options.pop("negatives", None)
    weights, excluding = options.pop("weights", None), options.pop("exclude", False)
    negatives = None
    if mode:
        shape = (rows, keys, features) if mode == "paired" else (keys, features)
        negatives = normal(*shape, dtype=dtype).requires_grad_()
        options["negative_mode"] = mode
    if weights:
        shape = (rows, keys) if weights == "NM" else (keys,)
        weight = normal(*shape, dtype=dtype)
        weight[..., ::3] = -INF
        if weights == "NM":
            weight[1] = -INF  # a row with no negative at all
        options["hard_negative_weight"] = weight
    if excluding:
        options["exclude"] = labels_of(rows)
    tau = temperature_of(temperature, rows, dtype)
    return (*pair(rows, features, dtype), negatives, tau), options


def of_learned(function, arguments):
    """function of those arguments alone that require grad, and these."""
    places = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor) and x.requires_grad]

    def of(*values):
        given = list(arguments)
        for place, value in zip(places, values, strict=True):
            given[place] = value
        return function(*given)

    return of, learned(arguments)
