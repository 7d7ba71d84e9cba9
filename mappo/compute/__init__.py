"""The means to run tensor functions fast on this machine: traced functions, compiler, CUDA graphs, resources.

Start with `traced_function`. No module of this package knows VMAS.
"""
