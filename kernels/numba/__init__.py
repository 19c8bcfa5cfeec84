"""The Numba version of the compiled kernels: the same functions with the same arguments."""
