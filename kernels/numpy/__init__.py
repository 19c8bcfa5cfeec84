"""What neglog.kernels offers for NumPy arrays."""
