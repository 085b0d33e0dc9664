"""A finished run as a folder that runs without gist: ONNX, ``torch.export`` or timm."""
