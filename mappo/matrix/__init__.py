"""The matrices: tasks x algorithms x training seeds, described in one file, and what their cells have come to.

Start with `matrix`. Nothing here imports torch: a cell is trained by `mappo.stages.run_cell`.
"""
