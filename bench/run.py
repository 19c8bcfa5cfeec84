"""`neglog bench`: options in, tables, JSON and picture out."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from . import Refusal, files, terminal
from .cases import BRIEF, OPS, SUITES, Shape, load

if TYPE_CHECKING:
    from .clocks import Clock
    from .report import JSON

DTYPES = ("float32", "bfloat16", "float16", "float64")
DIMENSIONS = tuple(dict.fromkeys(name for op in OPS.values() for name in op.default))
ROUNDS = {"large": 9, "memory": 9, "small": 60, "classes": 15}
PURPOSE, EXTRA = "bench", "bench"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench`."""
    parser.add_argument("op", choices=tuple(OPS), metavar="op", help=f"one of: {', '.join(OPS)}")
    for name in DIMENSIONS:
        parser.add_argument(f"--{name}", type=positive, metavar="N", help=_default_help(name))
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--suite", choices=tuple(SUITES), help=_suite_help())
    rounds = ", ".join(f"{count} of suite {suite}" for suite, count in ROUNDS.items())
    parser.add_argument("--repeat", type=positive, metavar="N", help=f"rounds ({rounds})")
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


def _suite_help() -> str:
    def losses(suite: str) -> str:
        having = [name for name, op in OPS.items() if suite in op.suites]
        return "" if len(having) == len(OPS) else f" ({', '.join(having)})"

    which = (f"{suite}: {what}{losses(suite)}" for suite, what in SUITES.items())
    return f"a set of shapes instead. {'; '.join(which)}"


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
    if options.suite and options.suite not in op.suites:
        raise Refusal(f"{options.op} has no suite {options.suite}: {', '.join(op.suites)}")
    if options.suite:
        return op.suites[options.suite]
    return (op.default | given,)


def _clock(device: str) -> Clock:
    import torch

    from .clocks import CPUClock, CUDAClock

    if device == "cpu":
        return CPUClock()
    if not torch.cuda.is_available():
        raise Refusal("bench --device cuda: torch finds no CUDA device")
    return CUDAClock()


def run(options: argparse.Namespace) -> None:
    """Measure and report. All that can be refused is refused before anything is measured."""
    shapes = _shapes(options)
    json_path = files.check_output(options.json, ".json", options.force)
    plot_path = files.check_output(options.plot, ".png", options.force)
    for module in ("rich", "psutil", "cpuinfo", *(["matplotlib"] if plot_path else [])):
        terminal.need(module, PURPOSE, EXTRA)
    torch = terminal.need("torch", PURPOSE, EXTRA)
    clock = _clock(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)

    from . import report

    screen = terminal.console()
    facts = report.environment()
    screen.print(report.header(facts))
    brief = options.suite in BRIEF
    results = _measure(options, shapes, clock, screen)
    if brief:
        terminal.show(screen, report.brief_table(results, options.suite))
    else:
        screen.print(report.notes(results[-1]), style="dim")
    _print_goals(screen, results)
    if json_path:
        entries = {"command": "bench", "op": options.op, "suite": options.suite}
        files.write_json(json_path, entries | facts | {"results": results})
        screen.print(f"[dim]wrote {json_path}[/]")
    if plot_path:
        from . import plot

        draw = plot.brief_figure if brief else plot.large_figure
        subtitle = report.header(facts).replace("\n", "; ")
        files.write_figure(plot_path, draw(results, subtitle))
        screen.print(f"[dim]wrote {plot_path}[/]")


def _measure(
    options: argparse.Namespace, shapes: tuple[Shape, ...], clock: Clock, screen: Any
) -> list[JSON]:
    import torch

    from . import report
    from .measure import Plan, measure

    suite = options.suite or "large"
    brief = suite in BRIEF
    plan = Plan(options.repeat or ROUNDS[suite], brief=brief)
    case = load(options.op)
    results = []
    for shape in shapes:
        torch.compiler.reset()  # eight compiled shapes of a function are the most
        with screen.status("making the inputs") as status:
            problem = case.problem(shape, options.dtype, options.seed, clock.device)
            contenders = [
                contender
                for contender in case.contenders(problem)
                if suite in contender.suites
                and not (options.no_compile and contender.library == "torch.compile")
            ]
            measured = measure(problem, contenders, clock, plan, status.update)
        results.append(report.as_json(measured))
        if not brief:
            terminal.show(screen, report.large_table(results[-1]))
    return results


def _print_goals(screen: Any, results: list[JSON]) -> None:
    """Those that speak of what was measured."""
    from . import goals

    found = [goal for goal in goals.evaluate(results, goals.CPU) if goal["met"] is not None]
    for line in goals.lines(found):
        screen.print(line)
