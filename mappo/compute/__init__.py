"""Tensors and this machine: traced functions, compiler, CUDA graphs, resources.

Start with `traced_function`. Nothing here knows VMAS.
"""
