"""VTAB-1K and suites like it: check the data, run every task, report the results."""
