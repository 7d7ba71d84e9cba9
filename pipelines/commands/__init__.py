"""One file, one command of `python -m pipelines`: its flags, and what it prints. The work is done elsewhere."""
