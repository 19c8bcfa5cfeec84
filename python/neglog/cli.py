"""The command line: `neglog info | demo | bench`.

What it runs lies beside the library, in neglog.bench and neglog.examples, and is imported when a
command asks for it.

Exit codes: 0 done, 1 a measured loss is wrong, 2 what was asked cannot be done.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from neglog import __version__

Rows = list[tuple[str, str]]


def _kernel_rows() -> Rows:
    from neglog import kernels

    chosen = kernels.isa_level()
    rows = [("ISA level", chosen or "none: no compiled kernels run here")]
    for build in kernels.isa_builds():
        if build.name != chosen:
            rows.append((f"  {build.name}", "usable, not the best" if build.usable else build.why))
    return rows


def _backend_rows() -> Rows:
    from neglog import availability

    rows = [
        (f"backend {state.name}", state.why if state.usable else f"no: {state.why}")
        for state in availability.describe()
    ]
    asked = os.environ.get("NEGLOG_BACKEND")
    known = asked in (None, "", *availability.BACKENDS)
    rows.append(("NEGLOG_BACKEND", (asked or "not set") + ("" if known else ": unknown backend")))
    return rows


def _matmul_rows() -> Rows:
    try:
        from neglog.tiles import gemm
    except ImportError:
        return []
    return [("matmul", f"{gemm.describe()} (measured now)")]


def _torch_rows() -> Rows:
    from neglog.bench import machine

    try:
        import torch
    except ImportError as error:
        why = "not installed" if error.name == "torch" else f"does not load: {error}"
        return [("torch", why), ("threads", f"{machine.cores()} (cores)")]
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpu = f"{devices} CUDA devices" if devices else "no CUDA device"
    return [("torch", f"{torch.__version__}, {gpu}"), ("threads", str(torch.get_num_threads()))]


def _openmp_rows() -> Rows:
    from neglog import kernels
    from neglog.bench import machine

    if kernels.isa_level():
        kernels.load("nll", "cython")  # brings its runtime into the process
    runtimes = machine.openmp_runtimes()
    if runtimes is None:
        return [("OpenMP", "not known: psutil tells it on Linux (pip install 'neglog[bench]')")]
    if len(runtimes) > 1:
        warning = "more than one: their threads compete for the cores"
        return [("OpenMP", warning), *(("", path) for path in runtimes)]
    return [("OpenMP", runtimes[0] if runtimes else "none loaded")]


def _info_rows() -> Rows:
    from neglog.bench import machine

    rows = [("neglog", __version__), ("processor", machine.processor())]
    return rows + _kernel_rows() + _backend_rows() + _torch_rows() + _matmul_rows() + _openmp_rows()


def info(options: argparse.Namespace) -> None:
    """Print what is loaded and why; in plain lines where there is no terminal or no rich."""
    from neglog.bench import Refusal, terminal

    try:
        rows = _info_rows()
    except ValueError as error:  # NEGLOG_ISA names no level: nothing can be loaded
        raise Refusal(str(error)) from error
    if not (sys.stdout.isatty() and find_spec("rich")):
        for name, value in rows:
            print(f"{name:<16} {value}")
        return
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table

    made = Table(title="neglog: what is loaded, and why", title_justify="left", box=SIMPLE)
    made.show_header = False
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(escape(name), escape(value))
    terminal.console().print(made)


def _check_environment(command: str) -> None:
    """What NEGLOG_ISA and NEGLOG_BACKEND ask for must exist before anything is measured with it."""
    from neglog.bench import Refusal, terminal

    terminal.need("torch", command, extra=command)
    try:
        from neglog import availability

        availability.demanded()
    except (ValueError, RuntimeError) as error:
        raise Refusal(str(error)) from error


def _demo(options: argparse.Namespace) -> None:
    _check_environment("demo")
    from neglog.examples.demo.run import run

    run(options)


def _bench(options: argparse.Namespace) -> None:
    _check_environment("bench")
    from neglog.bench.run import run

    run(options)


def parser() -> argparse.ArgumentParser:
    """The whole command line. Needs neither torch nor rich."""
    from neglog.bench.run import add_arguments as add_bench
    from neglog.examples.demo import add_arguments as add_demo

    top = argparse.ArgumentParser("neglog", description="Pretraining losses with native kernels.")
    top.add_argument("--version", action="version", version=f"neglog {__version__}")
    commands = top.add_subparsers(metavar="info | demo | bench", required=True)
    commands.add_parser("info", help="what is loaded, and why").set_defaults(run=info)
    demo = commands.add_parser("demo", help="train a small model with torch's loss and with neglog")
    add_demo(demo)
    demo.set_defaults(run=_demo)
    bench = commands.add_parser("bench", help="check, then time, implementations of one loss")
    add_bench(bench)
    bench.set_defaults(run=_bench)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    from neglog.bench import Mismatch, Refusal

    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except Refusal as refusal:
        print(f"neglog: {refusal}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("neglog: stopped", file=sys.stderr)
        return 130
    except Mismatch as mismatch:
        print(f"neglog: {mismatch}", file=sys.stderr)
        return 1
    return 0
