"""The losses at work: a small model trained on real text, once by torch's loss, once by neglog's.

task: what tasks have in common. clm, mlm, distill, simcse, clip: one task each. text, topics,
sentences: the data. gpt, bert, minilm, towers: the models. large: a batch beyond memory. train: two
runs. run: the command. plot: the picture. trainer: another's. pretrain, docstrings: what
pretraining gives.
Imports within this folder are relative, as in neglog.bench.
"""

from __future__ import annotations

import argparse

from neglog.bench.run import positive

# Each objective that can be shown; the module of that name has `load`, which gives its Task.
TASKS = {
    "clm": "causal language model: the next token, maximum likelihood",
    "mlm": "masked language model: BERT's hidden tokens",
    "distill": "a small GPT learns from a larger one by the classes that it thinks likeliest",
    "simcse": "sentence embeddings: MiniLM finds a sentence again behind dropout, among all others",
    "clip": "two towers: the words before, and those after, find each other in a batch of 2048",
}
# What is no comparison of two losses; the module of the name has `show`.
SHOWS = {
    "trainer": "transformers' Trainer on a small GPT-2 and BERT, with fuse(model) and without",
    "pretrain": "a GPT that read docstrings learns from a few pages, beside one that did not",
}
QUICK_STEPS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `demo`."""
    shown = {**TASKS, **SHOWS}
    tasks = "; ".join(f"{name}: {what}" for name, what in shown.items())
    parser.add_argument("--task", choices=tuple(shown), default="clm", help=tasks)
    parser.add_argument("--steps", type=positive, metavar="N",
                        help="of each run (the task's own, fewer on a slow machine)")  # fmt: skip
    parser.add_argument("--out", default="demo.png", metavar="FILE", help="the picture (demo.png)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (0)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps, to see it run")
    parser.add_argument("--force", action="store_true", help="overwrite a file of another maker")
