"""The VMAS task as TorchRL sees it, and its validation.

Start with `environment`. Only `environment` builds a simulator.
"""
