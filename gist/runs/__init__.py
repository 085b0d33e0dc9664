"""Runs: a training with its data, backbone, test and results in a folder."""
