"""bench/device.py without a GPU: its budget, its goals, and the libraries it may find or not."""

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

BENCH = Path(__file__).parent.parent / "bench"
MODULES = ("device", "goals", "measure", "report", "rivals", "tiles")
RIVALS = ("liger_kernel", "cut_cross_entropy", "quack", "inf_cl", "memeff")


@pytest.fixture
def bench(monkeypatch):
    """The scripts, on the CPU: a clock that says 2 ms, 3 MB, and nothing compiled."""
    monkeypatch.syspath_prepend(BENCH)
    modules = SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})

    def timed(run):
        run()
        return 2.0

    def peak(run):
        run()
        return 3.0

    monkeypatch.setattr(modules.measure, "timed", timed)
    monkeypatch.setattr(modules.measure, "peak_megabytes", peak)
    monkeypatch.setattr(modules.measure, "ROUNDS", 1)
    tiny = {
        "NLL": ((8, 500),),
        "LINEAR": (((16, 32, 500), 0.5),),
        "CLIP": (64, 32),
        "MILLION": (128, 32),
        "MATMUL": 16,
    }
    for name, size in tiny.items():
        monkeypatch.setattr(modules.device, f"SMALL_{name}", size)
    for module in (modules.device, modules.tiles):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(modules.rivals, "tried", {})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for name in RIVALS:
        monkeypatch.setitem(sys.modules, name, None)
    yield modules
    for name in MODULES:
        del sys.modules[name]


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
def libraries(monkeypatch, bench):
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


def run(bench, seconds=None):
    clock = bench.measure.Clock(seconds, kept=bench.device.MILLION_SECONDS)
    return list(bench.device.rows_of(bench.device.cases(small=True), clock))


def test_without_other_libraries_torch_and_neglog_are_measured(bench):
    rows = run(bench)
    assert all(row["ms"] == 2.0 for row in rows)
    assert {row["way"] for row in rows} == {
        "copy", "torch", "torch eager", "torch.compile", "neglog",
        *(["torch linear_cross_entropy"] if hasattr(F, "linear_cross_entropy") else []),
    }  # fmt: skip
    assert rows[-1]["case"] == bench.goals.clip_case(bench.device.SMALL_MILLION)
    assert rows[-1]["rounds"] == 1
    assert set(bench.rivals.absent()) == {" ".join(key) for key in bench.rivals.FUNCTIONS}
    assert bench.rivals.versions() == {}


def test_other_libraries_are_measured_and_compute_the_same_loss(bench, libraries):
    rows = run(bench)
    assert not [row for row in rows if "ms" not in row]
    assert bench.rivals.absent() == {}
    assert set(bench.rivals.versions()) == {name for name, _ in bench.rivals.FUNCTIONS}
    measured = {row["way"]: row for row in rows}
    for name in (*bench.rivals.versions(), "cut-cross-entropy, filtered"):
        assert isinstance(measured[name]["loss"], float), name
    assert list(bench.report.disagreements(rows)) == []


def test_a_library_that_overwrites_its_logits_gets_logits_of_its_own(bench, libraries):
    logits, target = bench.device.logits_and_target((8, 50), torch.float32)
    before = logits.clone()
    for way in bench.rivals.nll_in_place(logits, target).values():
        first = way.loss()
        way.run()
        assert way.loss() != first
    assert torch.equal(logits, before)


@pytest.mark.parametrize("error", [OSError("no libcuda"), SystemExit(3), ValueError()])
def test_whatever_an_import_raises_the_library_is_absent(bench, monkeypatch, error):
    real = importlib.import_module

    def broken(name):
        if name.split(".")[0] == "memeff":
            raise error
        return real(name)

    monkeypatch.setattr(bench.rivals.importlib, "import_module", broken)
    assert bench.rivals.those("clip") == {}
    assert bench.rivals.absent()["memeff clip"].startswith(type(error).__name__)


def test_a_library_without_the_function_is_absent(bench, monkeypatch):
    module(monkeypatch, "inf_cl")
    assert not bench.rivals.usable()
    assert "cal_flash_loss" in bench.rivals.absent()["inf-cl clip"]


def test_a_library_behind_a_pth_file_of_a_folder_on_the_path_is_found(bench, monkeypatch, tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "inf_cl.py").write_text("def cal_flash_loss():\n    return 7\n")
    (tmp_path / "inner.pth").write_text("inner\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "inf_cl")
    assert bench.rivals.those("clip")["inf-cl"]() == 7


def test_what_one_way_raises_does_not_stop_the_others(bench, libraries, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("an illegal memory access")

    module(monkeypatch, "quack.cross_entropy", cross_entropy=broken)
    rows = run(bench)
    failed = [row for row in rows if "failed" in row]
    assert {row["way"] for row in failed} == {"quack-kernels"}
    assert all("illegal" in row["failed"] for row in failed)
    assert "ms" in rows[-1]


def test_a_case_that_cannot_be_prepared_is_a_row_that_says_so(bench, monkeypatch):
    def full(*_):
        raise MemoryError("no memory")

    monkeypatch.setattr(bench.device, "logits_and_target", full)
    failed = [row for row in run(bench) if "failed" in row]
    assert [row["way"] for row in failed] == ["neglog", "neglog"]  # bfloat16 and float32


def test_no_case_starts_without_the_seconds_it_needs(bench, capsys):
    rows = run(bench, seconds=bench.device.MILLION_SECONDS + 1)
    assert all("skipped" in row for row in rows[:-1])
    assert "ms" in rows[-1]
    assert "1 s left, 5 needed" in capsys.readouterr().out
    (last,) = [row for row in run(bench, seconds=30) if row["case"] == rows[-1]["case"]]
    assert last["skipped"] == "30 s left, 60 needed"


def test_a_way_is_skipped_when_the_seconds_are_used_up(bench):
    clock = bench.measure.Clock(0.1)
    ways = {
        "slow": bench.measure.Way(lambda: time.sleep(0.03)),
        "late": bench.measure.Way(lambda: None),
    }
    slow, late = bench.measure.measured("case", ways, 1.0, "GB/s", clock)
    assert slow["ms"] == 2.0
    assert late == {"case": "case", "way": "late", "skipped": "no time left"}


def test_a_way_that_takes_too_long_is_given_up(bench, monkeypatch):
    monkeypatch.setattr(bench.measure, "WAY_SECONDS", 0.05)
    ways = {"endless": bench.measure.Way(lambda: time.sleep(5))}
    before = signal.getsignal(signal.SIGALRM)
    (row,) = bench.measure.measured("case", ways, 1.0, "GB/s", bench.measure.Clock())
    assert row["failed"].startswith("TooLong")
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_slow_call_has_fewer_rounds(bench, monkeypatch):
    monkeypatch.setattr(bench.measure, "ROUNDS", 15)
    monkeypatch.setattr(bench.measure, "timed", lambda run: 600.0)
    assert len(bench.measure.times_and_peak(lambda: None, once=False)[0]) == 5
    monkeypatch.setattr(bench.measure, "timed", lambda run: 9e3)
    assert len(bench.measure.times_and_peak(lambda: None, once=False)[0]) == 3
    assert len(bench.measure.times_and_peak(lambda: None, once=True)[0]) == 1


def row(case, way, **fields):
    return {"case": case, "way": way, "ms": 1.0, "GB/s": 1.0, "peak MB": 1.0, **fields}


def test_the_file_has_rows_goals_versions_and_what_is_absent(bench, libraries, tmp_path, capsys):
    rows = run(bench)
    rows.append({"case": "late", "way": "neglog", "skipped": "3 s left, 5 needed"})
    path = tmp_path / "device.json"
    bench.report.write(path, "a device", bench.report.versions(), rows)
    content = json.loads(path.read_text())
    assert content["rows"] == rows
    assert len(content["goals"]) == len(bench.goals.goals())
    assert {"torch", "neglog", "nvcc", "driver", "quack-kernels", "memeff"} <= set(
        content["versions"]
    )
    capsys.readouterr()
    bench.report.tell(rows, "a device", small=False)
    said = capsys.readouterr().out
    assert "skipped: 3 s left" in said
    assert said.rstrip().splitlines()[-1].startswith("clip_loss 1000000 x 768 bfloat16 completes")


def test_a_loss_that_is_another_is_pointed_out(bench):
    rows = [row("a", "neglog", loss=1.0), row("a", "close", loss=1.01), row("a", "far", loss=1.1)]
    rows += [row("a", "undefined", loss="nan"), row("b", "alone", loss=3.0)]
    told = list(bench.report.disagreements(rows))
    assert [line.split("the loss of ")[1].split()[0] for line in told] == ["far", "undefined"]


@pytest.fixture
def gpu(bench, monkeypatch):
    """What main asks of a GPU before it measures."""
    usable = SimpleNamespace(name="cuda", usable=True)
    monkeypatch.setattr(bench.device.dispatch, "describe", lambda: [usable])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_run_writes_its_file_and_fails_where_neglog_did(
    bench, gpu, monkeypatch, tmp_path, capsys
):
    path = tmp_path / "device.json"
    arguments = ["device.py", "--small", "--seconds", "200", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert bench.device.main() == 0
    content = json.loads(path.read_text())
    assert content["device"] == "NVIDIA H200"
    assert all("ms" in row for row in content["rows"])
    assert "not importable: liger-kernel nll (ModuleNotFoundError" in capsys.readouterr().out
    monkeypatch.setattr(bench.device.neglog, "clip_loss", None)
    assert bench.device.main() == 1


def test_a_run_that_is_cut_off_still_prints_table_and_goals(bench, gpu, monkeypatch, capsys):
    def cut_off(clock):
        yield row("first", "neglog")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(bench.device, "cases", lambda small: [bench.device.Case("first", cut_off)])
    monkeypatch.setattr(sys, "argv", ["device.py"])
    with pytest.raises(SystemExit):
        bench.device.main()
    out = capsys.readouterr().out
    assert "1.000 ms" in out
    assert "not importable: not tried" in out
    assert "Goals on NVIDIA H200" in out


def test_without_a_gpu_it_says_so(bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["device.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.device.main() == 2
    assert "nothing to time" in capsys.readouterr().err


def test_tiles_are_tried_and_what_was_is_set_back(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench.goals, "CLIP", (64, 32))
    monkeypatch.setattr(bench.goals, "LINEAR", (16, 32, 500))
    before = bench.tiles.pairs_op.CUDA_TILE_BYTES, bench.tiles.pairs_op.CUDA_WIDTH
    clock = bench.measure.Clock()
    bench.tiles.clip(clock)
    bench.tiles.linear(clock)
    assert before == (bench.tiles.pairs_op.CUDA_TILE_BYTES, bench.tiles.pairs_op.CUDA_WIDTH)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert all("'ms': 2.0" in line for line in lines)
