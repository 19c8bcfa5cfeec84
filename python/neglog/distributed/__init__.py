"""Losses over the processes of torch.distributed.

groups            that processes agree on a call, and how many rows each has
exchange          rows brought to all, summed to their owners, or sent round
blocks            the keys of all processes, a block at a time
pairs             log-sum-exps of queries with the keys of all, and their gradients
sigmoid           the sum of sigmoid losses of queries with keys that go round
totals            sums and statistics over the keys of all
tensors           DTensors as arguments
data_parallel     data-parallel modules in a step of many forwards
"""
