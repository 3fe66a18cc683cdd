"""The export from PyTorch to ONNX."""
