"""Engines that run with OpenVINO, on CPUs."""
