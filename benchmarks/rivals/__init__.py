"""One script a contestant of `benchmarks.sweep`, each run in a process, and maybe an environment, of its own."""
