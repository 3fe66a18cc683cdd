"""Which files of a source belong to a checkpoint."""

#: What is fetched and copied: configuration, tokenizers, the weights that transformers loads by default. Variants
#: (`model.fp16.safetensors`), other runtimes' copies and a training run's intermediate states are left.
WANTED_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
WANTED = ("*.json", "*.txt", "*.model", *WANTED_WEIGHTS)
WANTED_PICKLE = ("pytorch_model.bin", "pytorch_model-*-of-*.bin")
WANTED_CODE = ("*.py",)
UNWANTED = ["onnx/*", "openvino/*", "coreml/*", "gguf/*", "checkpoint-*/*"]

PICKLE_REMEDY = (
    "Unpickling runs whatever code is in it. Convert it to safetensors (save_pretrained), or set allow_pickle: true in "
    "its catalog entry (--allow-pickle on the command line) if you trust its author"
)
