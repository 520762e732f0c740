"""Measuring kernels on a GPU: `python -m tokenspeed.bench.gpu.NAME`, from the unbuilt source tree."""
