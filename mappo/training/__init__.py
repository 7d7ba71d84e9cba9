"""The training loop, its reports, and how a run resumes.

Start with `training`. `training_state` holds everything that changes from iteration to iteration.
"""
