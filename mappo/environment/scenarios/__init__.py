"""The VMAS scenarios of this project."""
