"""The compiled kernels: sources, and a folder for each ISA level that was built."""
