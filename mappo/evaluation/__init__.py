"""The quality of a policy: episodes on held-out seeds, confidence intervals, and comparisons.

Start with `evaluation`. Evaluations never change training.
"""
