"""What a cluster needs to run and to watch pipelines, and the programs that write some of its files."""
