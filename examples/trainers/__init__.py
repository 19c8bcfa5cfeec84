"""neglog in other people's trainers: the same training with and without it, one file for each.

    python examples/trainers/gpt_trainer.py [--quick]

measure.py runs both, each in a process of its own, and prints loss, time of a step and peak memory.
"""
