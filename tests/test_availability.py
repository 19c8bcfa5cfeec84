"""Which backends exist, what is said when one cannot run, and the record of which ran."""

import asyncio
import threading

import pytest
import torch
import torch.nn.functional as F

import neglog
from neglog import dispatch, kernels
from tests.support.processes import python


def draw(rows, vocab, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(rows, vocab, dtype=dtype), torch.randint(0, vocab, (rows,))


def ran_by(*arguments, **options):
    with dispatch.record() as ran:
        neglog.cross_entropy(*arguments, **options)
    return ran


def test_the_kernels_take_every_size():
    best = dispatch.best("cpu")
    assert best == "cython"
    for rows, vocab in ((1, 1), (2, 10), (200, 1000)):
        assert ran_by(*draw(rows, vocab)) == [f"nll:{best}"]
        assert ran_by(*draw(rows, vocab), z_loss=0.1) == [f"nll:{best}"]


def test_a_demand_is_of_its_thread():
    seen = []

    def other():
        seen.extend(ran_by(*draw(2, 10)))

    with dispatch.use("torch"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert ran_by(*draw(2, 10)) == ["nll:torch"]
    assert seen == [f"nll:{dispatch.best('cpu')}"]


def test_a_demand_is_of_its_task():
    """Two tasks of one thread, each of which demands a backend while the other waits."""
    entered = []

    async def task(backend):
        with dispatch.use(backend):
            entered.append(backend)
            while len(entered) < 2:
                await asyncio.sleep(0)
            return ran_by(*draw(2, 10))

    async def both():
        return await asyncio.gather(task("torch"), task("numba"))

    assert asyncio.run(both()) == [["nll:torch"], ["nll:numba"]]
    assert ran_by(*draw(2, 10)) == [f"nll:{dispatch.best('cpu')}"]


def test_a_compiled_function_follows_the_demand():
    torch._dynamo.reset()
    compiled = torch.compile(neglog.cross_entropy, fullgraph=True, backend="eager")
    x, t = draw(2, 10)
    found = []
    for backend in (None, "numba", None):
        with dispatch.use(backend), dispatch.record() as ran:
            compiled(x, t)
        found += ran
    best = dispatch.best("cpu")
    assert found == [f"nll:{best}", "nll:numba", f"nll:{best}"]


@pytest.mark.parametrize("backend", ["cython", "numba", "torch"])
def test_forcing(backend):
    assert ran_by(*draw(2, 10), backend=backend) == [f"nll:{backend}"]
    with dispatch.use(backend):
        assert ran_by(*draw(300, 1000)) == [f"nll:{backend}"]


def test_environment():
    code = (
        "import torch, neglog\n"
        "with neglog.dispatch.record() as ran:\n"
        "    neglog.cross_entropy(torch.randn(2, 3), torch.tensor([0, 1]))\n"
        "print(ran)"
    )
    assert python(code, NEGLOG_BACKEND="cython").stdout == "['nll:cython']\n"
    wrong = python(code, NEGLOG_BACKEND="cuda9000")
    assert wrong.returncode == 1
    assert "ValueError: NEGLOG_BACKEND: unknown backend: 'cuda9000'" in wrong.stderr
    for line in ("cython: available, compiled for", "numba: available", "cuda: "):
        assert line in wrong.stderr


def test_backend_not_available(monkeypatch):
    missing = kernels.Build("numba", False, "numba is not installed: pip install numba")
    monkeypatch.setitem(dispatch._STATES, "numba", missing)
    with pytest.raises(RuntimeError, match=r"(?s)backend not available here: 'numba'.*pip install"):
        neglog.cross_entropy(*draw(2, 3), backend="numba")


def test_a_forced_kernel_says_why_it_cannot():
    x, t = draw(2, 3)
    with pytest.raises(RuntimeError, match="logits of dtype"):
        neglog.cross_entropy(x.to(torch.float8_e4m3fn), t, backend="cython")


def test_subclasses_and_weights_with_gradient_go_to_torch():
    class Mine(torch.Tensor):
        pass

    x, t = draw(200, 1000)
    assert ran_by(x.as_subclass(Mine), t) == ["nll:torch"]
    weight = torch.rand(1000, requires_grad=True)
    probabilities = torch.rand(200, 1000)
    pair = [
        torch.autograd.grad(f(x, probabilities, weight), weight)[0]
        for f in (neglog.cross_entropy, F.cross_entropy)
    ]
    torch.testing.assert_close(*pair)


def test_meta_tensors():
    x, t = (value.to("meta") for value in draw(200, 1000))
    loss = neglog.cross_entropy(x, t, reduction="none")
    assert loss.device.type == "meta"
    assert loss.shape == (200,)


def test_isa_levels_are_explained():
    names = [build.name for build in kernels.isa_builds()]
    assert names == list(kernels.ISA_LEVELS)
    assert all(build.why for build in kernels.isa_builds())
    result = python("import neglog.kernels as k; print(k.isa_level())", NEGLOG_ISA="x86_64_v2")
    assert result.stdout == "x86_64_v2\n"
    wrong = python("import neglog.kernels as k; print(k.isa_level())", NEGLOG_ISA="mmx")
    assert "NEGLOG_ISA: expected one of" in wrong.stderr


def test_without_a_compiled_build_numba_runs_and_says_so_once():
    code = (
        "import sys\n"
        "sys.modules['neglog.kernels.cython.cpu_level'] = None\n"
        "import warnings, torch, neglog\n"
        "warnings.simplefilter('always')\n"
        "x = torch.randn(4, 9)\n"
        "with neglog.dispatch.record() as ran:\n"
        "    for _ in range(3):\n"
        "        neglog.cross_entropy(x, torch.tensor([1, 2, 3, 4]), z_loss=0.1)\n"
        "print(ran)"
    )
    result = python(code)
    assert result.stdout == f"{['nll:numba'] * 3}\n"
    assert result.stderr.count("no compiled kernels can run here, so Numba compiles") == 1


def test_without_any_kernel_torch_runs_and_kernels_say_what_to_install():
    code = (
        "import sys\n"
        "sys.modules['neglog.kernels.cython.cpu_level'] = None\n"
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'numba' else find(name, *rest)\n"
        "import torch, neglog, numpy as np\n"
        "with neglog.dispatch.record() as ran:\n"
        "    neglog.cross_entropy(torch.randn(400, 900), torch.arange(400))\n"
        "    neglog.cross_entropy(torch.randn(400, 900), torch.arange(400), z_loss=1.0)\n"
        "print(ran)\n"
        "neglog.kernels.nll_forward(np.zeros((1, 2), 'f'), [0])"
    )
    result = python(code)
    assert result.stdout == "['nll:torch', 'nll:torch']\n"
    assert result.stderr.count("RuntimeWarning: neglog: no kernels can run here, so torch's") == 1
    assert "ImportError: neglog: no kernels can run here" in result.stderr
    assert "pip install numba" in result.stderr


@pytest.mark.parametrize("first", ["torch", "neglog.kernels"])
def test_one_openmp_runtime(first):
    code = (
        f"import {first}\n"
        "import torch, neglog\n"
        "neglog.cross_entropy(torch.randn(300, 1000), torch.arange(300), backend='cython')\n"
        "torch.randn(500, 500) @ torch.randn(500, 500)\n"
        "lines = open('/proc/self/maps').read().splitlines()\n"
        "names = ('libgomp', 'libiomp', 'libomp')\n"
        "print({line.split()[-1] for line in lines if any(name in line for name in names)})"
    )
    runtimes = eval(python(code).stdout)
    assert len(runtimes) == 1, runtimes


def test_threads_that_leave_in_any_order_leave_no_demand():
    """What torch.compile traces reads a global, which must not keep a demand that has ended."""
    torch._dynamo.reset()
    first, second = dispatch.use("torch"), dispatch.use("numba")
    entered, left = threading.Event(), threading.Event()

    def other():
        with second:
            entered.set()
            left.wait()

    thread = threading.Thread(target=other)
    with first:
        thread.start()
        entered.wait()
    left.set()
    thread.join()
    compiled = torch.compile(neglog.cross_entropy, fullgraph=True, backend="eager")
    with dispatch.record() as ran:
        compiled(*draw(2, 10))
    assert ran == [f"nll:{dispatch.best('cpu')}"]
