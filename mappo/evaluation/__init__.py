"""The quality of a policy: episodes on held-out seeds, intervals, comparisons.

Start with `evaluation`. Evaluations never change training.
"""
