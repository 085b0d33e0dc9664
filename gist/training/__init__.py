"""Training a wrapped model: the loop, its config, batches, state on disk and log."""
