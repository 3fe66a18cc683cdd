"""The patterns of the files in a source that belong to a checkpoint."""

#: The files that are fetched and copied: configuration, tokenizers, and the weights that transformers loads by default.
#: Variants (`model.fp16.safetensors`), copies for other runtimes and the intermediate states of a training run are
#: left out.
WANTED_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
WANTED = ("*.json", "*.txt", "*.model", *WANTED_WEIGHTS)
WANTED_PICKLE = ("pytorch_model.bin", "pytorch_model-*-of-*.bin")
WANTED_CODE = ("*.py",)
UNWANTED = ["onnx/*", "openvino/*", "coreml/*", "gguf/*", "checkpoint-*/*"]

PICKLE_REMEDY = (
    "Unpickling runs any code that is in it. Convert it to safetensors (save_pretrained), or set allow_pickle: true in "
    "its catalog entry (--allow-pickle on the command line) if you trust its author"
)
