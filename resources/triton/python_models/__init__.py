"""Python models and their modules, which are copied into releases and run inside Triton."""
