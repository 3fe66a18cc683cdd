"""Engines that run with TensorRT or TensorRT-RTX, on NVIDIA GPUs."""
