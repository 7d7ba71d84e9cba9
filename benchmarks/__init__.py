"""The benchmarks, each of which is one command that measures programs side by side."""
