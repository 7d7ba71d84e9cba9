"""The part that survives a kill: runs, checkpoints and the stores that hold them.

Start with `run`. Only this wing imports boto3.
"""
