"""The gate, the champions and the exported policy.

Start with `promotion`. A champion changes only by a recorded decision.
"""
