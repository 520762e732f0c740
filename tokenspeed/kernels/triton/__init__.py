"""Kernels in Triton, for NVIDIA and AMD GPUs. Imported only where a GPU runner is built: triton is optional."""
