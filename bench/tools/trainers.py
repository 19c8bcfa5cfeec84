"""What `neglog.integrations.transformers.fuse(model)` costs and saves, on models of transformers.

    python bench/tools/trainers.py [--json FILE]

Memory: the peak of a training step of 1024 positions and 32000 tokens, beyond what the process held
before it: weights, gradients and inputs. The second step, each in a process of its own; the median
of 3.
Time: the steps of a fused and an unfused model in turn, in one process; medians.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from neglog.bench import terminal
from neglog.bench.machine import PeakMemory, processor
from neglog.integrations.transformers import fuse

ROWS, LENGTH, VOCAB = 8, 128, 32000
# Narrow, so that the step is the logits; and wide enough for gradients of the weights to count.
WIDTHS = (64, 256)
REPEATS, PROCESSES = 200, 3
Variant = Callable[[nn.Module], nn.Module]


def layers(vocab: int, width: int) -> dict[str, int]:
    return {
        "vocab_size": vocab, "hidden_size": width, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 2 * width,
    }  # fmt: skip


def llama(vocab: int, width: int) -> nn.Module:
    config = transformers.LlamaConfig(**layers(vocab, width))
    return transformers.LlamaForCausalLM(config)


def gemma2(vocab: int, width: int) -> nn.Module:
    """Its logits are capped, which torch does in three more passes."""
    config = transformers.Gemma2Config(
        head_dim=width // 4, num_key_value_heads=4, attn_implementation="eager",
        **layers(vocab, width),
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config)


def bert(vocab: int, width: int) -> nn.Module:
    config = transformers.BertConfig(**layers(vocab, width))
    return transformers.BertForMaskedLM(config)


MODELS = {"Llama": llama, "Gemma 2": gemma2, "BERT": bert}


def batch(rows: int, length: int, vocab: int, masked: bool) -> dict[str, Tensor]:
    ids = torch.randint(5, vocab, (rows, length), generator=torch.Generator().manual_seed(1))
    hidden = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.15
    return {"input_ids": ids, "labels": ids.masked_fill(~hidden, -100) if masked else ids}


def step(model: nn.Module, given: dict[str, Tensor]) -> float:
    loss = model(**given).loss
    loss.backward()
    return float(loss.detach())


def peak(name: str, width: int, fused: bool, sender: Any) -> None:
    torch.manual_seed(0)
    model = MODELS[name](VOCAB, width)
    if fused:
        fuse(model)
    given = batch(ROWS, LENGTH, VOCAB, name == "BERT")
    step(model, given)  # gradients are there from then on
    with PeakMemory() as memory:
        loss = step(model, given)
    sender.send((memory.extra, loss))


def memory_of(name: str, width: int, fused: bool) -> tuple[float, float]:
    """The median of some processes, and the loss."""
    found = [one_memory_of(name, width, fused) for _ in range(PROCESSES)]
    return median(bytes_ for bytes_, _ in found), found[0][1]


def one_memory_of(name: str, width: int, fused: bool) -> tuple[int, float]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=peak, args=(name, width, fused, sender))
    process.start()
    found: tuple[int, float] = receiver.recv()
    process.join()
    return found


def times(
    build: Callable[[], nn.Module], given: dict[str, Tensor], *variants: Variant
) -> list[float]:
    """Seconds of a whole step, AdamW's among it, of each variant of a model; in turn."""
    runs: list[tuple[nn.Module, torch.optim.Optimizer, list[float]]] = []
    for change in (lambda model: model, *variants):
        torch.manual_seed(0)
        model = change(build())
        runs.append((model, torch.optim.AdamW(model.parameters()), []))
    for _ in range(REPEATS):
        for model, optimizer, seconds in runs:
            start = perf_counter()
            step(model, given)
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(perf_counter() - start)
    return [median(seconds[REPEATS // 10 :]) for _, _, seconds in runs]


def small_models() -> dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]]:
    """Whose logits are smaller than anything worth saving."""
    return {
        "Llama": (lambda: llama(512, 64), batch(4, 32, 512, False)),
        "BERT": (lambda: bert(512, 64), batch(4, 32, 512, True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    options = parser.parse_args()
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    screen = terminal.console()
    screen.print(
        f"{processor()}, {torch.get_num_threads()} threads; transformers {transformers.__version__}"
    )
    report: dict[str, Any] = {"memory": {}, "overhead": {}}
    rows: list[tuple[str, ...]] = []
    for name, width in product(MODELS, WIDTHS):
        (plain, loss), (fused, same) = (memory_of(name, width, ours) for ours in (False, True))
        assert abs(loss - same) <= 1e-4 * loss
        report["memory"][f"{name}, width {width}"] = {"plain": plain, "fused": fused}
        sizes = (terminal.megabytes(int(plain)), terminal.megabytes(int(fused)))
        rows.append((name, str(width), *sizes, f"{fused / plain:.1%}"))
    columns = ("model", "width", "as it is", "fused", "share")
    title = f"Peak memory of a step, {ROWS * LENGTH} positions, {VOCAB} tokens"
    terminal.show(screen, terminal.Table(title, columns, rows))
    rows = []
    for name, (build, given) in small_models().items():
        plain_s, fused_s, forced_s = times(build, given, fuse, lambda m: fuse(m, min_bytes=0))
        report["overhead"][name] = {"plain": plain_s, "fused": fused_s, "min_bytes=0": forced_s}
        rows.append(
            (
                name, f"{plain_s * 1e3:.2f} ms", f"{fused_s / plain_s - 1:+.1%}",
                f"{forced_s / plain_s - 1:+.1%}",
            )
        )  # fmt: skip
    heads = ("model", "as it is", "fuse(model)", "fuse(model, min_bytes=0)")
    title = "A step of 128 positions, 512 tokens, width 64: nothing to save"
    terminal.show(screen, terminal.Table(title, heads, rows))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
