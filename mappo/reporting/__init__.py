"""The output for people: pages, tables and progress. Start with `run_page`. A page reads typed reports."""
