"""Tiles of a product: how many rows fit in a workspace, and the fastest GEMM for one."""
