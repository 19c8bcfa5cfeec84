"""A GPU's run without a GPU: its budget, its results, and the libraries it may find or not."""

import importlib
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import neglog
from neglog.bench import device, goals, report, rivals
from neglog.bench.budget import Budget
from neglog.bench.cases import HEAD, PAIRS, ROWS, load, shapes
from neglog.bench.clocks import CPUClock
from tests.support.commands import neglog as neglog_command

TOOLS = Path(__file__).parents[2] / "bench" / "tools"
RIVALS = ("liger_kernel", "cut_cross_entropy", "quack", "inf_cl", "memeff")


class SetClock(CPUClock):
    """Runs each call, and says 2 ms and 3 MB of it."""

    def seconds(self, call):
        call()
        return 2e-3

    def peak(self, call):
        call()
        return 3_000_000


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Tiny shapes on the CPU, nothing compiled, no other library."""
    # With torch loaded a collection takes a tenth of a second, and a run makes about sixty.
    monkeypatch.setattr("gc.collect", lambda: 0)
    monkeypatch.setattr(device, "DEVICE", "cpu")
    monkeypatch.setattr(device, "CUDAClock", SetClock)
    monkeypatch.setattr(device, "ROUNDS", 1)
    monkeypatch.setattr(device, "SMALL_CROSS_ENTROPY", shapes(ROWS, (8, 500)))
    monkeypatch.setattr(device, "SMALL_LINEAR", *shapes(HEAD, (16, 32, 500)))
    monkeypatch.setattr(device, "SMALL_CLIP", *shapes(PAIRS, (64, 32)))
    monkeypatch.setattr(device, "SMALL_MILLION", *shapes(PAIRS, (128, 32)))
    monkeypatch.setattr(rivals, "_imported", {})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for name in RIVALS:
        monkeypatch.setitem(sys.modules, name, None)


def module(monkeypatch, name, **functions):
    """A library that can be imported, with the packages above it."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        path = ".".join(parts[:depth])
        if not isinstance(sys.modules.get(path), ModuleType):
            monkeypatch.setitem(sys.modules, path, ModuleType(path))
    for function, what in functions.items():
        monkeypatch.setattr(sys.modules[name], function, what, raising=False)


def formula(x, weight, target, **_):
    return F.cross_entropy(x @ weight.t(), target)


class InPlace(torch.autograd.Function):
    """As Liger's: the gradient lies where the logits were."""

    @staticmethod
    def forward(ctx, logits, target):
        values = logits.detach()
        with torch.enable_grad():
            leaf = values.clone().requires_grad_()
            loss = F.cross_entropy(leaf, target)
        values.data.copy_(torch.autograd.grad(loss, leaf)[0])
        ctx.save_for_backward(values)
        return loss.detach()

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0] * upstream, None


class Memeff(torch.nn.Module):
    def __init__(self, temperature, normalized_inputs, stable):
        super().__init__()
        assert normalized_inputs
        assert not stable
        self.scale = 1 / temperature

    def forward(self, image, text):
        z, target = self.scale * image @ text.t(), torch.arange(len(image))
        return (F.cross_entropy(z, target) + F.cross_entropy(z.t(), target)) / 2


def flash_loss(q, k, labels=None, scale=None, head_dim=256):
    assert q.shape[1] % head_dim == 0
    return F.cross_entropy(scale * q @ k.t(), torch.arange(len(q)), reduction="none")


@pytest.fixture
def libraries(monkeypatch):
    def quack_nll(x, target, inplace_backward=False):
        return InPlace.apply(x, target) if inplace_backward else F.cross_entropy(x, target)

    liger = "liger_kernel.transformers.functional"
    module(monkeypatch, liger, liger_cross_entropy=InPlace.apply,
           liger_fused_linear_cross_entropy=formula)  # fmt: skip
    module(monkeypatch, "cut_cross_entropy", linear_cross_entropy=formula)
    module(monkeypatch, "quack.cross_entropy", cross_entropy=quack_nll)
    module(monkeypatch, "quack.linear_cross_entropy", chunked_linear_cross_entropy=formula)
    module(monkeypatch, "inf_cl", cal_flash_loss=flash_loss)
    module(monkeypatch, "memeff", MemoryEfficientCLIPLoss=Memeff)


def run(seconds=None):
    budget = Budget(seconds, kept=device.MILLION_SECONDS)
    return list(device.results_of(device.cases(small=True), SetClock(), budget))


def contenders(results):
    return [contender for result in results for contender in result["contenders"]]


def test_without_other_libraries_torch_and_neglog_are_measured():
    results = run()
    assert not any(result["left_out"] for result in results)
    found = contenders(results)
    assert all(contender["total_ms"] == 2.0 for contender in found)
    assert {contender["library"] for contender in found} == {"torch", "torch.compile", "neglog"}
    assert not any(contender["mismatch"] for contender in found)
    (last,) = results[-1]["contenders"]
    assert results[-1]["shape"] == device.SMALL_MILLION
    assert (last["name"], last["total_seconds"], last["loss"]) == ("neglog", [2e-3], None)
    assert set(rivals.absent()) == {" ".join(key) for key in rivals.FUNCTIONS}
    assert rivals.versions() == {}


def test_torch_is_compiled_in_bfloat16_alone():
    dtypes = {r["dtype"] for r in run() for c in r["contenders"] if c["name"] == "compile"}
    assert dtypes == {"bfloat16"}


def test_other_libraries_are_measured_beside_neglog_and_agree_with_it(libraries):
    results = run()
    assert not any(result["left_out"] for result in results)
    assert not any(contender["mismatch"] for contender in contenders(results))
    assert rivals.absent() == {}
    assert set(rivals.versions()) == {name for name, _ in rivals.FUNCTIONS}
    beside = {}
    for result in results:
        own, *others = result["contenders"]
        if own["library"] == "neglog":
            beside.update({other["name"]: own["name"] for other in others})
            assert all(other["name"] in own["times_faster"] for other in others)
    assert set(beside) == {*rivals.versions(), "cut-cross-entropy, filtered"}


def test_a_library_that_overwrites_its_logits_gets_logits_of_its_own(libraries):
    problem = load("cross_entropy").problem({"rows": 8, "vocab": 50}, "float32", 0)
    before = problem.leaves[0].detach().clone()
    case = device.Case("cross_entropy", problem.spec.shape, "float32", who="others")
    groups = list(device.groups(case, problem))
    assert [[one.name for one in group] for group in groups] == [
        ["inplace", "liger-kernel"], ["neglog", "quack-kernels"], ["inplace", "quack-kernels"],
    ]  # fmt: skip
    for group in groups:
        result = report.as_json(device.measure(problem, group, SetClock(), device.Plan(1)))
        assert len(result["contenders"]) == 2
    assert torch.equal(problem.leaves[0], before)


@pytest.mark.parametrize("error", [OSError("no libcuda"), SystemExit(3), ValueError()])
def test_whatever_an_import_raises_the_library_is_absent(monkeypatch, error):
    real = importlib.import_module

    def broken(name):
        if name.split(".")[0] == "memeff":
            raise error
        return real(name)

    monkeypatch.setattr(rivals.importlib, "import_module", broken)
    assert rivals.functions("clip_loss") == {}
    assert rivals.absent()["memeff clip_loss"].startswith(type(error).__name__)


def test_a_library_without_the_function_is_absent(monkeypatch):
    module(monkeypatch, "inf_cl")
    assert not rivals.functions("clip_loss")
    assert "cal_flash_loss" in rivals.absent()["inf-cl clip_loss"]


def test_a_library_behind_a_pth_file_of_a_folder_on_the_path_is_found(monkeypatch, tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "inf_cl.py").write_text("def cal_flash_loss():\n    return 7\n")
    (tmp_path / "inner.pth").write_text("inner\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "inf_cl")
    assert rivals.functions("clip_loss")["inf-cl"]() == 7


def test_what_one_library_raises_does_not_stop_the_others(libraries, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("an illegal memory access")

    module(monkeypatch, "quack.cross_entropy", cross_entropy=broken)
    results = run()
    failed = [why for result in results for why in result["left_out"].items()]
    assert {name for name, _ in failed} == {"quack-kernels"}
    assert all("illegal" in why for _, why in failed)
    assert results[-1]["contenders"]


def test_a_case_that_cannot_be_prepared_says_so(monkeypatch):
    def full(*_, **__):
        raise MemoryError("no memory")

    monkeypatch.setattr(load("cross_entropy"), "problem", full)
    failed = [result for result in run() if result["left_out"]]
    assert [result["left_out"] for result in failed] == [
        {"neglog": "failed: MemoryError: no memory"}
    ] * 2  # bfloat16 and float32


def test_no_case_starts_without_the_seconds_it_needs():
    results = run(seconds=device.MILLION_SECONDS + 1)
    skipped = {why for r in results[:-1] for why in r["left_out"].values()}
    assert skipped == {"skipped: 1 s left, 5 needed"}
    assert results[-1]["contenders"]
    assert run(seconds=30)[-1]["left_out"] == {"neglog": "skipped: 30 s left, 60 needed"}


@pytest.fixture
def gpu(monkeypatch):
    """What main asks of a GPU before it measures."""
    usable = SimpleNamespace(name="cuda", usable=True)
    numba = SimpleNamespace(name="numba", usable=False)
    monkeypatch.setattr(device.dispatch, "describe", lambda: [usable, numba])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_run_writes_its_file_and_fails_where_neglog_did(gpu, monkeypatch, tmp_path, capsys):
    path = tmp_path / "device.json"
    arguments = ["--small", "--seconds", "200", "--json", str(path)]
    assert device.main(arguments) == 0
    content = json.loads(path.read_text())
    assert content["device"] == "NVIDIA H200"
    assert not any(result["left_out"] for result in content["results"])
    assert len(content["goals"]) == len(goals.CUDA)
    assert {"torch", "neglog", "nvcc", "driver", "triton"} <= set(content["versions"])
    assert "not importable: liger-kernel cross_entropy (ModuleNotFound" in capsys.readouterr().out
    monkeypatch.setattr(neglog, "clip_loss", None)
    assert device.main(arguments) == 1


def test_a_run_that_is_cut_off_still_prints_table_and_goals(gpu, monkeypatch, capsys):
    done = run()[0]

    def cut_off(*_):
        yield done
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(device, "results_of", cut_off)
    with pytest.raises(SystemExit):
        device.main([])
    printed = capsys.readouterr().out
    assert "2.000 ms" in printed
    assert "Goals on NVIDIA H200" in printed
    last = printed.rstrip().splitlines()[-1]
    assert last.startswith("clip_loss 1000000 x 768 bfloat16 completes")
    assert last.endswith("not measured")


def test_what_was_skipped_and_what_is_wrong_is_printed(capsys):
    results = [run()[0]]
    results[0]["contenders"][0]["mismatch"] = "torch eager: the loss is off"
    results[0]["left_out"] = {"late": "skipped: no time left"}
    device.print_results(results, "a device", small=True)
    printed = capsys.readouterr().out
    assert "torch eager: the loss is off\n" in printed
    assert "skipped: no time left" in printed


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.main([]) == 2
    assert "nothing to time" in capsys.readouterr().err


def test_it_needs_torch_and_numpy_alone():
    """A bare machine with a GPU may have nothing else."""
    code = (
        "import sys\n"
        "for name in ('rich', 'psutil', 'cpuinfo', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "from neglog.bench import device\n"
        "device.print_results([], 'a device', False)\n"
        "print(device.facts('a device')['cores'])"
    )
    done = neglog_command(code=code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].isdigit()


def test_tiles_are_tried_and_what_was_is_set_back(monkeypatch, capsys):
    (clip,), (linear,) = shapes(PAIRS, (64, 32)), shapes(HEAD, (16, 32, 500))
    monkeypatch.setattr(goals, "CLIP", clip)
    monkeypatch.setattr(goals, "LINEAR", linear)
    tiles = runpy.run_path(str(TOOLS / "tiles.py"))
    tiles["clip"].__globals__["DEVICE"] = "cpu"
    op = tiles["schedule"]
    before = op.CUDA_TILE_BYTES, op.CUDA_WIDTH
    tiles["clip"](SetClock(), Budget())
    tiles["linear"](SetClock(), Budget())
    assert before == (op.CUDA_TILE_BYTES, op.CUDA_WIDTH)
    assert capsys.readouterr().out.count("2.000 ms") == 2 * 11  # forward, and both
