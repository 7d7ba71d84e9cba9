"""The VMAS task as a TorchRL environment, and its validation.

Start with `environment`. No other module builds a simulator.
"""
