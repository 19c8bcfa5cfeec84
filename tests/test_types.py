"""What mypy says of a program that uses neglog, and what an editor lists of its modules."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import neglog
from neglog import kernels, nn
from tests.support.code_blocks import ROOT

PROGRAM = """\
import numpy as np
import torch

import neglog
from neglog import dispatch, kernels, nn, reference

x, target = torch.randn(4, 8, requires_grad=True), torch.arange(4)
mask, head = target > 0, torch.randn(9, 8)
wanted = bool(target[0])

# Each loss by each value of return_stats
reveal_type(neglog.cross_entropy(x, target))  # shows Tensor
reveal_type(neglog.cross_entropy(x, target, return_stats=True))  # shows LossStats
reveal_type(neglog.cross_entropy(x, target, return_stats=wanted))  # shows Tensor | LossStats
reveal_type(neglog.masked_cross_entropy(x, target, mask))  # shows Tensor
reveal_type(neglog.masked_cross_entropy(x, target, mask, return_stats=True))  # shows LossStats
reveal_type(neglog.linear_cross_entropy(x, head, target))  # shows Tensor
reveal_type(neglog.linear_cross_entropy(x, head, target, return_stats=True))  # shows LossStats
reveal_type(neglog.info_nce(x, x, temperature=0.2))  # shows Tensor
reveal_type(neglog.info_nce(x, x, None, 0.2, "sum", return_stats=True))  # shows LossStats

neglog.info_nce(x, x, positives=mask[:, None] & mask, symmetric=True)
neglog.info_nce(x, x, positives=(target, target), return_stats=True)
neglog.info_nce(x, x, positives=[1, 2])  # error call-overload
reveal_type(neglog.similarity_logsumexp(x, x, 0.2, excluded=target))  # shows Tensor

found: neglog.TokenLogprobs = neglog.token_logprobs(x, target, temperature=0.7)
reveal_type(found)  # shows TokenLogprobs
reveal_type(found.entropy)  # shows Tensor
reveal_type(neglog.linear_token_logprobs(x, head, target, shift=True))  # shows TokenLogprobs
neglog.token_logprobs(x, target, reduction="mean")  # error call-arg

reveal_type(neglog.kl_div_loss(x, x))  # shows Tensor
parts: neglog.KLDivStats = neglog.kl_div_loss(x, x, target, hard_weight=0.5, return_stats=True)
reveal_type(neglog.linear_kl_div_loss(x, head, x, teacher_weight=head))  # shows Tensor
reveal_type(neglog.linear_kl_div_loss(x, head, x, return_stats=True))  # shows KLDivStats
neglog.kl_div_loss(x, x, reduction="batchmean")  # error call-overload
neglog.linear_cross_entropy(x, head, target, logits_dtype="float32")
neglog.cross_entropy(x, target, token_weight=x[:, 0], per_sequence=True)

# Losses with one result
reveal_type(neglog.clip_loss(x, x, 10.0, options={"workspace_mb": 1}))  # shows Tensor
reveal_type(neglog.vocab_parallel_cross_entropy(x, x, label_smoothing=0.1))  # shows Tensor
reveal_type(neglog.vocab_parallel_linear_cross_entropy(x, x, x))  # shows Tensor
reveal_type(neglog.vocab_parallel_cross_entropy(x, x, return_stats=True))  # shows LossStats
neglog.clip_loss(x, x, 10.0, exchange="round")  # error arg-type
reveal_type(neglog.siglip_loss(x, x, 10.0, -10.0))  # shows Tensor
reveal_type(neglog.nt_xent(x, x, 0.5, "none"))  # shows Tensor
reveal_type(neglog.dcl(x, x, normalize=False))  # shows Tensor
reveal_type(neglog.sup_con(x, target, backend="torch"))  # shows Tensor
neglog.sup_con(x, ["a", "b", "a", "b"])
reveal_type(neglog.cached_step(torch.nn.Linear(8, 4), (x, x), neglog.info_nce))  # shows Tensor

# Arguments
neglog.cross_entropy(x, target, reduction="avg")  # error call-overload
neglog.cross_entropy(x, target, backend="gpu")  # error call-overload
neglog.cross_entropy(x, target, return_stat=True)  # error call-overload
neglog.info_nce(x, x, negative_mode="all")  # error call-overload
neglog.nt_xent(x, x, reduction="avg")  # error arg-type
neglog.clip_loss(x, x, 10.0, options={"workspace": 1})  # error arg-type
neglog.linear_cross_entropy(x, head, target, options={"workspace_mb": 1, "filter_eps": "auto"})
neglog.linear_cross_entropy(x, head, target, options={"filter_eps": "all"})  # error call-overload

# Modules
reveal_type(nn.CrossEntropyLoss(label_smoothing=0.1).forward(x, target))  # shows Tensor | LossStats
nn.MaskedCrossEntropyLoss(z_loss=1e-4).forward(x, target, mask)
nn.LinearCrossEntropyLoss(8, 9, bias=True, shift=True).forward(x, target, mask=mask)
reveal_type(nn.InfoNCELoss(0.1, return_stats=True).forward(x, x))  # shows Tensor | LossStats
reveal_type(nn.CLIPLoss().forward(x, x, 10.0))  # shows Tensor
reveal_type(nn.SigLIPLoss().forward(x, x, 10.0, -10.0))  # shows Tensor
reveal_type(nn.CLIPLoss().forward(x, x, 10.0, output_dict=True))  # shows dict
reveal_type(nn.SigLIPLoss().forward(x, x, 10.0, -10.0, output_dict=True))  # shows dict
reveal_type(nn.NTXentLoss(0.5).forward(x, x))  # shows Tensor
reveal_type(nn.DCLLoss().forward(x, x))  # shows Tensor
reveal_type(nn.SupConLoss().forward(x, target))  # shows Tensor
reveal_type(nn.Queue(16, 8).forward())  # shows Tensor
reveal_type(nn.Queue(16, 8, with_ids=True).key_ids())  # shows Tensor
nn.CrossEntropyLoss().forward(x)  # error call-arg
nn.NTXentLoss().forward(x, 1)  # error arg-type

# What chooses and records the backend
reveal_type(neglog.explain(neglog.cross_entropy, x, target))  # shows Route
neglog.Route("torch", "", False, torch.float32, 0, "").backend.upper()
stats: neglog.LossStats = neglog.cross_entropy(x, target, return_stats=True)
reveal_type(stats.entropy)  # shows Tensor
with neglog.patch_torch() as patch, dispatch.record() as ran:
    patch.undo()
    ran.append(neglog.__version__)
with neglog.options(gradient="backward") as chosen:
    reveal_type(chosen)  # shows options
neglog.options(gradient="later")  # error arg-type

# NumPy
logits, labels = np.zeros((4, 8), np.float32), np.arange(4)
result = kernels.nll_forward(logits, labels)
reveal_type(result)  # shows NLL
reveal_type(kernels.nll_backward(np.ones(4), result, logits, labels))  # shows ndarray
result, gradient = kernels.nll_forward_backward(logits, labels)
reveal_type(gradient)  # shows ndarray
taught: kernels.KL = kernels.kl_forward(logits, logits, beta=0.5)
taught, gradient = kernels.kl_forward_backward(logits, logits)
pair = kernels.pairs_forward(logits)
reveal_type(pair)  # shows Pairs
reveal_type(kernels.pairs_backward(pair, logits, grad_row_lse=np.ones(4)))  # shows ndarray
kinds: tuple[type[kernels.NLL], type[kernels.Pairs]] = (kernels.NLL, kernels.Pairs)
build: kernels.Build = kernels.available(kernels.BACKENDS[0])
reveal_type(kernels.load("nll"))  # shows ModuleType
reveal_type(kernels.isa_level() or kernels.ISA_LEVELS[0])  # shows str
reveal_type(kernels.isa_builds()[0].usable)  # shows bool
reference.nll(logits, labels)
"""


def mypy(folder: Path) -> list[tuple[int, str, str]]:
    """What mypy says of the program: the line, an error's code or "note", and the text."""
    (folder / "program.py").write_text(PROGRAM, encoding="utf-8")
    # An installed package is found by itself; a checkout is not, as mypy runs no import hooks.
    checkout = Path(neglog.__file__).parents[1]
    path = {} if checkout.name == "site-packages" else {"MYPYPATH": str(checkout)}
    run = subprocess.run(
        [
            sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent",
            "--no-error-summary", f"--cache-dir={ROOT / '.mypy_cache' / 'strict'}", "program.py",
        ],
        cwd=folder, env={**os.environ, **path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.stderr == ""
    found = []
    for line in run.stdout.splitlines():
        matched = re.fullmatch(r"program\.py:(\d+): (note|error): (.*?)(?:  \[([a-z-]+)\])?", line)
        assert matched, line
        number, kind, text, code = matched.groups()
        found.append((int(number), code or kind, text))
    return found


def expected(word: str) -> dict[int, str]:
    """What stands behind `# shows` or `# error`, by line."""
    found = (line.partition(f"  # {word} ") for line in PROGRAM.splitlines())
    return {number: text for number, (_, mark, text) in enumerate(found, 1) if mark}


def test_mypy_finds_the_expected_types_and_errors(tmp_path):
    found = mypy(tmp_path)
    assert {line: code for line, code, _ in found if code != "note"} == expected("error")
    shown = {}
    for line, _, text in found:
        if text.startswith("Revealed type is"):
            # A named tuple is shown as a tuple of its fields, and its name after them.
            text = re.sub(r"tuple\[[^=]*, fallback=([\w.]+)\]", r"\1", text.split('"')[1])
            shown[line] = re.sub(r"\b\w+\.", "", text).partition("[")[0]
    assert shown == expected("shows")


def test_the_program_uses_every_public_name():
    used = set(re.findall(r"\b(neglog|nn|kernels)\.(\w+)", PROGRAM))
    used |= {("neglog", name) for name in ("dispatch", "kernels", "nn", "reference")}
    for module, name in ((neglog, "neglog"), (nn, "nn"), (kernels, "kernels")):
        assert {(name, public) for public in module.__all__} <= used


NAMES = {
    neglog: """KLDivStats LossStats Route TokenLogprobs __version__ cached_step clip_loss
        cross_entropy dcl dispatch explain info_nce kernels kl_div_loss linear_cross_entropy
        linear_kl_div_loss
        linear_token_logprobs masked_cross_entropy nn
        nt_xent options patch_torch reference siglip_loss similarity_logsumexp sup_con
        token_logprobs
        vocab_parallel_cross_entropy vocab_parallel_linear_cross_entropy""",
    nn: """CLIPLoss CrossEntropyLoss DCLLoss InfoNCELoss LinearCrossEntropyLoss
        MaskedCrossEntropyLoss NTXentLoss Queue SigLIPLoss SupConLoss""",
    kernels: """BACKENDS Build ISA_LEVELS KL NLL Pairs available isa_builds isa_level kl_forward
        kl_forward_backward load nll_backward
        nll_forward nll_forward_backward pairs_backward pairs_forward""",
}


@pytest.mark.parametrize("module", NAMES, ids=lambda module: module.__name__)
def test_dir_lists_the_public_names(module):
    assert dir(module) == sorted(NAMES[module].split())
