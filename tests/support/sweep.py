"""neglog.integrations.transformers on every model class of transformers that has a small instance.

    python -m tests.support.sweep [--write PAGE] [TYPE ...]

Of each class: loss and gradients of `fuse(model)` beside those of the model as it was, and whether
the logits were made. TYPE is a kind (causal, masked, seq2seq, image-text) or a model type. Each
class has a process of its own, so that one that fails or takes much memory harms no other.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from tests.support import fused_models, shrunk_models

PROCESSES, SECONDS = 2, 60
FUSED, MADE, REFUSED, DIFFERS, NOT_BUILT = "fused", "made", "refused", "differs", "not built"
MEANING = {
    FUSED: "loss and gradients agree, and the logits were never made",
    MADE: "they agree; something read the logits, which were made",
    REFUSED: "`fuse` says why, and the model stays as it was",
    DIFFERS: "loss or gradients do not agree",
    NOT_BUILT: "no small instance of the class here",
}


class Case(NamedTuple):
    kind: str
    model_type: str
    class_name: str


class Result(NamedTuple):
    case: Case
    outcome: str
    error: float | None
    why: str


def cases(wanted: list[str]) -> list[Case]:
    """A class once for each kind, though several model types have it."""
    found: dict[tuple[str, str], Case] = {}
    for kind, names in shrunk_models.KINDS.items():
        for model_type, name in names.items():
            if not wanted or kind in wanted or model_type in wanted:
                found.setdefault((kind, name), Case(kind, model_type, name))
    return list(found.values())


def result_of(case: Case) -> Result:
    try:
        model, given = shrunk_models.build(case.model_type, case.kind, case.class_name)
    except shrunk_models.CannotBuild as error:
        return Result(case, NOT_BUILT, None, str(error))
    try:
        plain = fused_models.step(model, given)
    except RuntimeError as error:
        return Result(case, NOT_BUILT, None, f"its own backward fails: {error}")
    try:
        fused_models.fuse(model)
    except (TypeError, ValueError) as error:
        return Result(case, REFUSED, None, str(error))
    fused = fused_models.step(model, given)
    error = fused_models.difference(plain, fused)
    if not error <= fused_models.TOLERANCE:
        fused_models.unfuse(model)
        again = fused_models.difference(plain, fused_models.step(model, given))
        return Result(case, DIFFERS, error, f"unfused again {again:.1e}; {fused.made}")
    if not fused.fused:
        return Result(case, MADE, error, "; ".join(fused.made) or "the loss takes no cross_entropy")
    return Result(case, MADE if fused.made else FUSED, error, "; ".join(fused.made))


def _child(case: Case, connection: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        connection.send(result_of(case))
    except Exception as error:
        connection.send(Result(case, DIFFERS, None, f"{type(error).__name__}: {error}"))


def run(work: list[Case]) -> Iterator[Result]:
    """In PROCESSES processes, each forked for one case once transformers is imported."""
    fork = multiprocessing.get_context("fork")
    waiting, running = list(reversed(work)), {}
    while waiting or running:
        while waiting and len(running) < PROCESSES:
            case = waiting.pop()
            here, there = fork.Pipe(duplex=False)
            process = fork.Process(target=_child, args=(case, there))
            process.start()
            there.close()
            running[here] = (case, process, time.monotonic())
        for here in wait(list(running), timeout=1.0):
            case, process, _ = running.pop(here)
            try:
                yield here.recv()
            except EOFError:
                process.join()
                yield Result(case, DIFFERS, None, f"the process ended with {process.exitcode}")
            process.join()
        for here, (case, process, start) in list(running.items()):
            if time.monotonic() - start > SECONDS:
                process.kill()
                del running[here]
                yield Result(case, NOT_BUILT, None, f"takes more than {SECONDS} seconds")


def table(results: list[Result], seconds: float) -> str:
    kinds = list(shrunk_models.KINDS)
    counts = Counter((r.case.kind, r.outcome) for r in results)
    lines = ["| outcome | " + " | ".join(kinds) + " | means |", "|---" * (len(kinds) + 2) + "|"]
    for outcome, meaning in MEANING.items():
        numbers = " | ".join(str(counts[kind, outcome]) for kind in kinds)
        lines.append(f"| {outcome} | {numbers} | {meaning} |")
    lines += ["", f"{len(results)} classes in {seconds:.0f} seconds.", ""]
    lines += ["| class | kind | outcome | error | why |", "|---|---|---|---|---|"]
    order = {outcome: i for i, outcome in enumerate([DIFFERS, REFUSED, MADE, FUSED, NOT_BUILT])}
    for r in sorted(results, key=lambda r: (order[r.outcome], kinds.index(r.case.kind), r.case)):
        error = "" if r.error is None else f"{r.error:.0e}"
        why = r.why.replace("|", "/").replace("\n", " ")[:160]
        lines.append(f"| {r.case.class_name} | {r.case.kind} | {r.outcome} | {error} | {why} |")
    return "\n".join(lines) + "\n"


HEADING = """# Which models of transformers

`neglog.integrations.transformers.fuse(model)` beside the same model unfused: transformers
{version}, torch {torch}, CPU, float32. Each class has its default configuration, shrunk, and
random weights. Loss and all gradients agree where the largest difference is at most
{tolerance:.0e} of the largest gradient. Image-text models get text, and images where they demand
them. The page is made by

```sh
python -m tests.support.sweep --write docs/trainers/models.md
```

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--write", type=Path, metavar="PAGE")
    given = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    # What nearly every class imports, once for all processes.
    _: Any = (transformers.LlamaForCausalLM, transformers.T5ForConditionalGeneration)
    start, results = time.monotonic(), []
    for result in run(cases(given.types)):
        results.append(result)
        print(*result.case, result.outcome, result.error, result.why, sep="\t", flush=True)
    text = table(results, time.monotonic() - start)
    print(text.split("| class |")[0])
    if given.write:
        heading = HEADING.format(
            version=transformers.__version__,
            torch=torch.__version__.split("+")[0],
            tolerance=fused_models.TOLERANCE,
        )
        given.write.parent.mkdir(parents=True, exist_ok=True)
        given.write.write_text(heading + text)


if __name__ == "__main__":
    main()
