"""The fused forward of backbones: the only place that knows a library's own forward."""
