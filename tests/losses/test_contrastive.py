"""The contrastive losses against their formulas: values, gradients, precision, edges."""

import info_nce as info_nce_pytorch
import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses as metric_learning

import neglog
from neglog import dispatch
from tests.support import contrastive_formulas as formulas
from tests.support.contrastive_formulas import (
    BACKENDS,
    INF,
    KERNELS,
    LOSSES,
    OF_ONE_NUMBER,
    TILES,
    case,
    gradients,
    labels_of,
    learned,
    normal,
    pair,
)  # fmt: skip


@pytest.fixture(params=BACKENDS)
def backend(request):
    with dispatch.use(request.param):
        yield request.param


def both(name, arguments, **options):
    """Loss and gradients by neglog, and by the formula."""
    reduction = {key: value for key, value in options.items() if key == "reduction"}
    found = getattr(neglog, name)(*arguments, **options)
    expected = getattr(formulas, name)(*arguments, **reduction)
    inputs = learned(arguments)
    return (found, gradients(found, inputs)), (expected, gradients(expected, inputs))


def reductions(name):
    return ("mean",) if name in OF_ONE_NUMBER else ("none", "mean", "sum")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_agrees_with_the_formula(backend, name, dtype):
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    arguments = case(name, dtype=dtype)
    for reduction in reductions(name):
        options = {} if name in OF_ONE_NUMBER else {"reduction": reduction}
        for workspace in (TILES, None):
            with dispatch.record() as ran:
                ours, theirs = both(name, arguments, options=workspace, **options)
            op = "pairs_sigmoid" if name == "siglip_loss" else "pairs"
            by_rows = name == "info_nce" and workspace and options["reduction"] != "none"
            if by_rows and backend != "torch":  # rows alone, and not kept: keys are classes
                op = "linear_nll"
            assert ran[0] == f"{op}:{backend}"
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("features", [1, 3, 384, 640, 1152])
def test_sizes(backend, name, features):
    options = {} if name in OF_ONE_NUMBER else {"reduction": "sum"}
    for rows in (1, 2, 7, 31, 257, *((700,) if features in (3, 640) else ())):
        if rows == 1 and name == "dcl":
            continue  # nothing to be held against: see test_empty_batches
        arguments = case(name, rows, features, torch.float32)
        ours, theirs = both(name, arguments, **options)
        scale = 1 + abs(float(theirs[0].detach()))
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-5 * scale)


# The forms of info_nce

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
    tau = {
        "number": 0.3,
        "tensor": torch.tensor(0.3, dtype=dtype, requires_grad=True),
        "of each row": torch.linspace(0.1, 0.6, rows, dtype=dtype).requires_grad_(),
    }[temperature]
    return (*pair(rows, features, dtype), negatives, tau), options


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", FORMS)
def test_forms_of_info_nce(backend, name, temperature):
    inputs, options = form(name, temperature)
    for reduction in ("none", "mean", "sum"):
        with dispatch.record() as ran:
            ours = neglog.info_nce(*inputs, reduction=reduction, options=TILES, **options)
        in_memory = backend == "torch" or options.get("negative_mode") == "paired"
        assert ran == [f"pairs:{'torch' if in_memory else backend}"]
        theirs = formulas.info_nce(*inputs, reduction=reduction, **options)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        found, expected = (gradients(loss, learned(inputs)) for loss in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", FORMS)
def test_statistics(backend, name):
    inputs, options = form(name, "of each row")
    stats = neglog.info_nce(*inputs, return_stats=True, options=TILES, **options)
    torch.testing.assert_close(stats.loss, formulas.info_nce(*inputs, **options))
    plain = {k: v for k, v in options.items() if k not in ("symmetric", "label_smoothing")}
    scores, target = formulas.info_nce_scores(*inputs, **plain)
    torch.testing.assert_close(stats.logsumexp, torch.logsumexp(scores, 1))
    assert torch.equal(stats.correct, scores.argmax(1) == target)
    p = torch.softmax(scores, 1)
    torch.testing.assert_close(stats.entropy, torch.special.entr(p).sum(1).detach())
    assert not stats.correct.requires_grad
    assert not stats.entropy.requires_grad
    grads = (gradients(lse, learned(inputs))
             for lse in (stats.logsumexp, torch.logsumexp(scores, 1)))  # fmt: skip
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("features", [24, 384])
def test_the_best_key_is_not_beaten_by_its_own_rounding(backend, features):
    query = normal(700, features, dtype=torch.float32)
    stats = neglog.info_nce(query, query + 0.1 * normal(700, features, dtype=query.dtype, seed=2),
                            temperature=0.01, return_stats=True)  # fmt: skip
    assert stats.correct.all()


# Other libraries


@pytest.mark.parametrize("mode", [None, "unpaired", "paired"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_info_nce_pytorch(backend, mode, reduction):
    query, key = pair(dtype=torch.float32)
    shape = {"unpaired": (150, 24), "paired": (300, 5, 24), None: (1,)}[mode]
    negatives = normal(*shape, dtype=torch.float32).requires_grad_() if mode else None
    inputs = learned((query, key, negatives))
    losses = [
        function(query, key, negatives, 0.07, reduction, mode or "unpaired")
        for function in (neglog.info_nce, info_nce_pytorch.info_nce)
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*(gradients(x, inputs) for x in losses), rtol=1e-5, atol=1e-5)


def test_pytorch_metric_learning(backend):
    z_i, z_j = pair(60, dtype=torch.float32)
    theirs = metric_learning.SelfSupervisedLoss(metric_learning.NTXentLoss(0.2))(z_i, z_j)
    ours = neglog.nt_xent(z_i, z_j, 0.2)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    grads = (gradients(loss, (z_i, z_j)) for loss in (ours, theirs))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("labels", ["some alone", "most alone", "all alone"])
def test_sup_con_of_pytorch_metric_learning(backend, labels):
    (z, _), rows = pair(dtype=torch.float32), torch.arange(300)
    labels = {
        "some alone": labels_of(300) - 40,
        "most alone": rows.clamp(min=5),
        "all alone": rows,
    }[labels]
    theirs = metric_learning.SupConLoss(0.2)(z, labels)
    ours = neglog.sup_con(z, labels, 0.2)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    grads = (gradients(loss, (z,)) for loss in (ours, theirs))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_labels_of_any_integers(backend, dtype):
    (z, _), labels = pair(60), labels_of(60)
    expected = formulas.sup_con(z, labels)
    torch.testing.assert_close(neglog.sup_con(z, labels.to(dtype)), expected)


# Precision


def errors(name, arguments, function, **options):
    """Relative errors of loss and gradients against float64."""
    loss = function(*arguments, **options)
    exact = [x.detach().double().requires_grad_(x.requires_grad)
             if isinstance(x, torch.Tensor) and x.is_floating_point() else x
             for x in arguments]  # fmt: skip
    truth = getattr(formulas, name)(*exact)
    found = (loss, *torch.autograd.grad(loss, learned(arguments)))
    expected = (truth, *torch.autograd.grad(truth, learned(exact)))
    return [
        float((f.detach().double() - t.detach()).norm() / t.norm().detach())
        for f, t in zip(found, expected, strict=True)
    ]


@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", KERNELS)
def test_error_is_within_torchs(backend, name, dtype, temperature):
    arguments = case(name, 600, 40, dtype, temperature)
    ours = errors(name, arguments, getattr(neglog, name), backend=backend)
    theirs = errors(name, arguments, getattr(formulas, name))
    # The error of one number, the loss or the gradient of the temperature, is a matter of luck.
    of_one = max(1e-6, torch.finfo(dtype).eps)
    # Either rounds similarities to 16 bits once, but this formula after they are scaled: 0.6 and 60
    # have other distances to the next power of two.
    factor = 2.0 if name == "clip_loss" and dtype != torch.float32 else 1.2
    sizes = [1, *(x.numel() for x in learned(arguments))]
    for mine, other, size in zip(ours, theirs, sizes, strict=True):
        assert mine <= factor * other + (of_one if size == 1 else 1e-6), (ours, theirs)


@pytest.mark.parametrize("name", ["info_nce", "clip_loss", "nt_xent", "sup_con"])
def test_logits_of_a_hundred(backend, name):
    """e^100 is not a float32, and rows whose best score is -100 must not vanish beside others."""
    arguments = list(case(name, 400, 30, torch.float32, temperature=0.01))
    common = F.normalize(normal(1, 30, dtype=torch.float32))
    with torch.no_grad():
        arguments[0][:200] = common + 0.02 * arguments[0][:200]
        for x in arguments[1:2] if name != "sup_con" else ():
            x[:] = -common + 0.02 * x
        arguments[:2] = [F.normalize(x) if x.is_floating_point() else x for x in arguments[:2]]
    arguments = [x.requires_grad_(x.is_floating_point()) if isinstance(x, torch.Tensor) else x
                 for x in arguments]  # fmt: skip
    ours = errors(name, arguments, getattr(neglog, name), options=TILES)
    theirs = errors(name, arguments, getattr(formulas, name))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine <= 1.2 * other + 2e-6, (ours, theirs)


# Edges


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_empty_batches(backend, name, reduction):
    arguments = case(name, 0)
    if name in OF_ONE_NUMBER:
        assert getattr(neglog, name)(*arguments).isnan()
        return
    loss = getattr(neglog, name)(*arguments, reduction=reduction)
    expected = getattr(formulas, name)(*arguments, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    found = torch.autograd.grad(loss.sum(), learned(arguments), allow_unused=True)
    assert all(g is None or g.shape == x.shape
               for g, x in zip(found, learned(arguments), strict=True))  # fmt: skip


def test_decoupled_from_nothing(backend):
    z_i, z_j = pair(1, 3)
    assert neglog.dcl(z_i, z_j) == -INF
    assert torch.autograd.grad(neglog.dcl(z_i, z_j), z_i)[0].isfinite().all()


@pytest.mark.parametrize("mode", ["unpaired", "paired", "in_batch"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_no_negatives(backend, mode, smoothing):
    query, key = pair(7, 5)
    negatives = torch.zeros((7, 0, 5) if mode == "paired" else (0, 5), dtype=query.dtype)
    inputs = (query, key, negatives, torch.tensor(0.1, dtype=query.dtype, requires_grad=True))
    options = {"negative_mode": mode, "label_smoothing": smoothing}
    losses = [f(*inputs, **options) for f in (neglog.info_nce, formulas.info_nce)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(gradients(x, learned(inputs)) for x in losses))


@pytest.mark.parametrize("mode", ["unpaired", "paired", "in_batch"])
def test_all_negatives_are_padding(backend, mode):
    name = {"unpaired": "queue", "paired": "paired", "in_batch": "in batch and further"}[mode]
    inputs, options = form(name)
    losses = [
        f(*inputs, hard_negative_weight=-INF, **options)
        for f in (neglog.info_nce, formulas.info_nce)
    ]
    torch.testing.assert_close(*losses)
    found, expected = (gradients(x, learned(inputs)) for x in losses)
    torch.testing.assert_close(found, expected)
    assert not found[2].any()


def test_all_others_are_of_one_group(backend):
    query, key = pair(40)
    loss = neglog.info_nce(query, key, exclude=torch.zeros(40, dtype=torch.int32), symmetric=True)
    torch.testing.assert_close(loss, torch.zeros_like(loss))
    assert all(not g.any() for g in gradients(loss, (query, key)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zero_vectors(backend, dtype):
    query, key = pair(300, dtype=dtype)
    with torch.no_grad():
        query[::4] = 0
        key[::6] = 0
    tau = torch.tensor(0.1, requires_grad=True)
    loss = neglog.info_nce(query, key, None, tau, symmetric=True)
    expected = formulas.info_nce(query.double(), key.double(), None, tau, symmetric=True)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (tau, key))[:1])


def test_norms_too_large_for_float16(backend):
    query, key = (x.detach() * 1000 for x in pair(300, dtype=torch.float16))
    assert not (query * query).isfinite().all()
    loss = neglog.info_nce(query.requires_grad_(), key.requires_grad_())
    expected = formulas.info_nce(query.double(), key.double())
    torch.testing.assert_close(loss.double(), expected, rtol=2e-3, atol=2e-3)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (query, key)))


def test_not_contiguous(backend):
    query, key = pair(48, 60)
    found = neglog.info_nce(query.t(), key.t(), symmetric=True)
    torch.testing.assert_close(found, formulas.info_nce(query.t(), key.t(), symmetric=True))
    torch.testing.assert_close(
        gradients(found, (query, key)),
        gradients(formulas.info_nce(query.t(), key.t(), symmetric=True), (query, key)),
    )


def test_the_kernels_take_every_size():
    for rows in (1, 100, 700):
        with dispatch.record() as ran:
            neglog.info_nce(*pair(rows))
        assert ran == [f"pairs:{dispatch.best('cpu')}"]


def test_numbers_for_scale_and_bias(backend):
    image, text = pair(unit=True)
    torch.testing.assert_close(
        neglog.clip_loss(image, text, 20.0, 5.0), formulas.clip_loss(image, text, 20.0)
    )
    torch.testing.assert_close(
        neglog.siglip_loss(image, text, 20, -9), formulas.siglip_loss(image, text, 20, -9)
    )


@pytest.mark.parametrize("temperature", [0.05, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sup_con_of_sure_pairs(backend, dtype, temperature):
    """Only mates that are almost the same: losses near 0, of which rounding would be all."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.linalg.qr(torch.randn(96, 96, generator=generator))[0][:48]
    labels = torch.arange(48).repeat(2)
    z = (centres[labels] + 0.01 * torch.randn(96, 96, generator=generator)).to(dtype)
    rows = neglog.sup_con(z, labels, temperature, "none")
    exact = neglog.sup_con(z.double(), labels, temperature, "none", backend="torch")
    assert bool((rows >= 0).all())
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(rows.double(), exact, rtol=0.2, atol=tolerance)
    mean = neglog.sup_con(z, labels, temperature)
    torch.testing.assert_close(mean, rows.mean(), rtol=2e-2, atol=1e-6)


def test_sup_con_of_one_long_row(backend):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40, 6, generator=generator)
    z[3] *= 1e4
    labels = torch.arange(40) // 4
    ours = neglog.sup_con(z, labels, 1e4, "none", normalize=False)
    exact = neglog.sup_con(z.double(), labels, 1e4, "none", normalize=False)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("mode", ["in_batch", "unpaired", "paired"])
def test_smoothing_leaves_padding_out(backend, mode, smoothing):
    query, key = pair(6)
    keys = torch.randn(6, 3, query.shape[1], dtype=query.dtype)
    keys = keys if mode == "paired" else keys[0]
    weight = torch.tensor([0.0, -torch.inf, 1.0], dtype=query.dtype)
    temperature = torch.tensor(0.1, dtype=query.dtype, requires_grad=True)
    found = []
    for kept in ([0, 1, 2], [0, 2]):
        loss = neglog.info_nce(
            query, key, keys[..., kept, :], temperature, negative_mode=mode,
            hard_negative_weight=weight[kept], label_smoothing=smoothing,
        )  # fmt: skip
        found.append((loss, *torch.autograd.grad(loss, (query, key, temperature))))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("mode", ["in_batch", "unpaired", "paired"])
def test_statistics_of_nothing(backend, mode):
    x = torch.zeros(0, 4)
    negatives = torch.zeros(0, 2, 4) if mode == "paired" else torch.zeros(2, 4)
    stats = neglog.info_nce(x, x, negatives, negative_mode=mode, return_stats=True)
    assert stats.loss.isnan()
    assert [part.shape for part in stats[1:]] == [(0,)] * 3
