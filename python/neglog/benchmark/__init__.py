"""Measuring the losses side by side: verified first, then timed in turn.

machine, files, figure and terminal serve the demo too. Each op that can be measured is one file in
`cases`.
"""


class Refusal(Exception):
    """What was asked cannot be done; the message says why, and what can."""


class Mismatch(Exception):
    """A contender's loss or gradient is not that of the float64 oracle."""
