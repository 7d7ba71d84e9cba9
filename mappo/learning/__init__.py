"""Networks and the update of one batch.

Start with `learner`. The loss, the optimiser and their state live here alone.
"""
