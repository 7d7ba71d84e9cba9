"""The project's own VMAS scenarios."""
