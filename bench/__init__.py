"""Benchmarks: `python -m bench`, or `gist bench` inside the repository.

One file per thing measured, each with peers beside ours in the same run. A benchmark yields cases
(bench/measure.py); running, tables, JSON and plots are the same for all (bench/report.py).
"""
