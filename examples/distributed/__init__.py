"""Training over processes by torchrun, beside one process with the whole batch."""
