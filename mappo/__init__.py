"""MAPPO experiments on VMAS: train, evaluate and validate, on a laptop or as Kubeflow stages."""

__version__ = "0.4.0"
