"""The commands of `python -m pipelines`, one file each: flags and printed output. Other modules do the work."""
