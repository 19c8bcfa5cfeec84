"""`neglog bench`: options in, tables, JSON and figure out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from neglog.benchmark import Refusal, files, terminal
from neglog.benchmark.cases import OPS, Shape, load

DTYPES = ("float32", "bfloat16", "float16", "float64")
DIMENSIONS = tuple(dict.fromkeys(name for op in OPS.values() for name in op.default))
SMALL_ROUNDS = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench`."""
    parser.add_argument("op", choices=tuple(OPS), metavar="op", help=f"one of: {', '.join(OPS)}")
    for name in DIMENSIONS:
        parser.add_argument(f"--{name}", type=positive, metavar="N", help=_default_help(name))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--suite", choices=("large", "small"), help="a set of shapes instead")
    parser.add_argument("--repeat", type=positive, metavar="N",
                        help=f"rounds (9; with --suite small {SMALL_ROUNDS})")  # fmt: skip
    parser.add_argument("--threads", type=positive, metavar="N", help="as torch chooses")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (0)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", metavar="FILE", help="every round and all versions")
    parser.add_argument("--plot", metavar="FILE", help="a PNG of the results")
    parser.add_argument("--force", action="store_true", help="overwrite files of other makers")


def positive(text: str) -> int:
    """An argument that must be a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {number}")
    return number


positive.__name__ = "whole number"  # argparse names the type so: "invalid whole number value"


def _default_help(dimension: str) -> str:
    sizes = (f"{op.default[dimension]} for {name}" for name, op in OPS.items()
             if dimension in op.default)  # fmt: skip
    return f"size ({', '.join(sizes)})"


def _shapes(options: argparse.Namespace) -> tuple[Shape, ...]:
    op = OPS[options.op]
    given = {name: getattr(options, name) for name in DIMENSIONS}
    given = {name: size for name, size in given.items() if size is not None}
    for name in given:
        if options.suite:
            raise Refusal(f"--{name} and --suite: a suite brings its own shapes, give one of them")
        if name not in op.default:
            known = ", ".join(f"--{name}" for name in op.default)
            raise Refusal(f"{options.op} has no --{name}: its shape is {known}")
    if options.suite:
        return getattr(op, options.suite)
    return (op.default | given,)


def run(options: argparse.Namespace) -> None:
    """Measure and report. All that can be refused is refused before anything is measured."""
    shapes = _shapes(options)
    json_path = files.check_output(options.json, ".json", options.force)
    plot_path = files.check_output(options.plot, ".png", options.force)
    screen = terminal.console("bench")
    if plot_path:
        terminal.need("matplotlib", "bench --plot")
    torch = terminal.need("torch", "bench")
    if options.threads:
        torch.set_num_threads(options.threads)

    from neglog.benchmark import report

    facts = report.environment()
    screen.print(report.header(facts))
    measure = _run_small if options.suite == "small" else _run_large
    results, figure = measure(options, shapes, screen, report.header(facts), plot_path)
    if json_path:
        entries = {"command": "bench", "op": options.op, "suite": options.suite}
        files.write_json(json_path, entries | facts | {"results": results})
        screen.print(f"[dim]wrote {json_path}[/]")
    if plot_path:
        files.write_figure(plot_path, figure)
        screen.print(f"[dim]wrote {plot_path}[/]")


def _run_large(
    options: argparse.Namespace, shapes: Any, screen: Any, header: str, plot: Path | None
) -> tuple[list[dict[str, Any]], Any]:
    import torch

    from neglog.benchmark import report
    from neglog.benchmark.measure import Measurement, measure

    case = load(options.op)
    measurements: list[Measurement] = []
    written = []
    for shape in shapes:
        torch.compiler.reset()
        with screen.status("making the inputs") as status:
            problem = case.problem(shape, options.dtype, options.seed)
            contenders = case.contenders(not options.no_compile, shape, options.dtype)
            measured = measure(problem, contenders, options.repeat or 9, status.update)
        screen.print(report.large_table(options.op, measured))
        written.append(report.large_json(measured))
        measurements.append(measured)
    screen.print(report.notes(measurements[-1]), style="dim")
    if plot is None:
        return written, None
    from neglog.benchmark.plot import large_figure

    return written, large_figure(options.op, measurements, header.replace("\n", "; "))


def _run_small(
    options: argparse.Namespace, shapes: Any, screen: Any, header: str, plot: Path | None
) -> tuple[list[dict[str, Any]], Any]:
    from neglog.benchmark import report
    from neglog.benchmark.measure import measure_small

    case = load(options.op)
    results = []
    with screen.status("measuring") as status:
        for shape in shapes:
            status.update(f"measuring {report.shape_text(shape)}")
            problem = case.problem(shape, options.dtype, options.seed)
            results.append(
                measure_small(problem, case.small_contenders(), options.repeat or SMALL_ROUNDS)
            )
    screen.print(report.small_table(options.op, options.dtype, results))
    written = [report.small_json(options.dtype, result) for result in results]
    if plot is None:
        return written, None
    from neglog.benchmark.plot import small_figure

    return written, small_figure(options.op, results, header.replace("\n", "; "))
