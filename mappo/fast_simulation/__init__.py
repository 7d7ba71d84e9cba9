"""The compiled simulation and the check that it equals VMAS.

Start with `fast_simulation`. A scenario that cannot be compiled faithfully is refused with the reason.
"""
