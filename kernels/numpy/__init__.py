"""The kernels on NumPy arrays."""
