"""The part that survives a killed process: runs, their checkpoints, and the stores that hold the checkpoints.

Start with `run`. Only this wing imports boto3.
"""
