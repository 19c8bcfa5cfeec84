"""The backends that run here for tensors in the CPU's memory; tests/csrc has the others."""

from neglog import dispatch

BACKENDS = [state.name for state in dispatch.describe() if state.usable and state.name != "cuda"]
KERNELS = [name for name in BACKENDS if name != "torch"]
BEST = KERNELS[0]
NUMBA = [name for name in KERNELS if name == "numba"]
