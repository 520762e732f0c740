"""Kernels in Triton, one file per memory pattern. Importing a module here imports triton."""
