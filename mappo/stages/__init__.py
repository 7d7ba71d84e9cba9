"""The stages of the pipelines, one file each, as components run them.

Start with `runtime`. A stage turns every readable error into one line.
"""
