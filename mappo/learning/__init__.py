"""The networks and their update on a batch.

Start with `learner`. No other package contains the loss, the optimiser or their state.
"""
