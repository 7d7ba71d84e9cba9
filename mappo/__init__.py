"""Train, evaluate and validate MAPPO experiments on VMAS, on a laptop or as stages of a Kubeflow pipeline."""

__version__ = "0.5.0"
