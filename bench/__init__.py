"""Measures the losses side by side: each is checked first, then all are timed in turn.

cases: one file for each loss, with its inputs and its contenders. contender: what a case is made
of. measure: the loop, for any clock. clocks: the CPU's and CUDA's. report, plot: what was measured,
as JSON, tables and pictures. run: `neglog bench`. device, goals, rivals: a GPU's run. machine,
files, figure and terminal serve the demo too. tools: scripts for developers, not installed.

Imports within this folder are relative: mypy reads it as `bench`, Python as `neglog.bench`.
"""


class Refusal(Exception):
    """What was asked cannot be done; the message says why, and what can."""


class Mismatch(Exception):
    """A contender's loss or gradient is not that of the float64 oracle."""
