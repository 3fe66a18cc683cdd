"""Engines that run with ONNX Runtime: on CPUs, on GPUs with CUDA, and on GPUs with its TensorRT provider."""
