"""The command line, one file for each group of commands.

Start with `arguments`. Modules without `_actions` in their name import no torch.
"""
