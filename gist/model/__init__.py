"""The adapted model: its config, Gist token, loss, saving, merging and description."""
