"""VTAB-1K and suites like it: checking the data, running every task, reporting honestly."""
