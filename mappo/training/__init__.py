"""The training loop, what it reports and how it resumes.

Start with `training`. All that changes between iterations is in `training_state`.
"""
