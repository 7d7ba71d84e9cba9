"""Everything that people look at: pages, tables, progress. Start with `run_page`. A page reads typed reports."""
