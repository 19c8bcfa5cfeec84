"""The compiled kernels: their sources, and one folder for each ISA level that was built."""
