"""The Numba twins: same names and signatures as the compiled kernels."""
