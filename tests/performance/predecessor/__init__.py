"""The way in which transformer-deploy (2021) served an encoder, as a repository for the embedded Triton.

An ensemble without batches (`max_batch_size: 0`): a Python model with transformers' tokenizer, which pads nothing, and
ONNX Runtime on a graph in fp32 with its usual settings. Two things are not as they were. The embedded server has no
ONNX Runtime backend, so a Python model runs the graph. And transformers is not in that server's environment: the
tokenizer's model puts the packages of the environment that runs this *behind* the server's own on `sys.path`, so that
numpy stays the server's, and transformers, which works with numpy 1, is found.
"""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

NAME = "minilm_onnx_inference"
_TOKENS = ("input_ids", "attention_mask", "token_type_ids")


def write_repository(root: Path, checkpoint: Path, graph: Path, *, output: str, width: int, max_tokens: int) -> None:
    """Write the three models below `root`. graph: an ONNX file whose inputs are among the tokenizer's outputs."""
    import onnx

    known = [item.name for item in onnx.load(str(graph), load_external_data=False).graph.input]
    arrays = [name for name in _TOKENS if name in known]
    tokenizer, engine = "minilm_onnx_tokenize", "minilm_onnx_model"
    tensors = {name: f'name: "{name}" data_type: TYPE_INT64 dims: [ -1, -1 ]' for name in arrays}
    text = 'input { name: "TEXT" data_type: TYPE_STRING dims: [ -1, 1 ] }\n'
    answer = f'output {{ name: "{output}" data_type: TYPE_FP32 dims: [ -1, {width} ] }}\n'
    one = "instance_group { count: 1 kind: KIND_CPU }\n"
    settings = {"packages": sysconfig.get_path("purelib"), "checkpoint": checkpoint, "max_tokens": max_tokens}
    _write(
        root / tokenizer,
        f'name: "{tokenizer}"\nbackend: "python"\nmax_batch_size: 0\n{text}{one}'
        + "".join(f"output {{ {tensor} }}\n" for tensor in tensors.values())
        + "".join(f'parameters {{ key: "{key}" value {{ string_value: "{it}" }} }}\n' for key, it in settings.items()),
        "tokenizer_model.py",
    )
    _write(
        root / engine,
        f'name: "{engine}"\nbackend: "python"\nmax_batch_size: 0\n{answer}{one}'
        + "".join(f"input {{ {tensor} }}\n" for tensor in tensors.values())
        + f'parameters {{ key: "graph" value {{ string_value: "{graph}" }} }}\n',
        "engine_model.py",
    )
    steps = "".join(
        f'step {{ model_name: "{name}" model_version: -1 {maps} }}\n'
        for name, maps in (
            (
                tokenizer,
                'input_map { key: "TEXT" value: "TEXT" }'
                + "".join(f' output_map {{ key: "{name}" value: "{name}" }}' for name in arrays),
            ),
            (
                engine,
                "".join(f'input_map {{ key: "{name}" value: "{name}" }} ' for name in arrays)
                + f'output_map {{ key: "{output}" value: "{output}" }}',
            ),
        )
    )
    _write(
        root / NAME,
        f'name: "{NAME}"\nplatform: "ensemble"\nmax_batch_size: 0\n{text}{answer}ensemble_scheduling {{\n{steps}}}\n',
        None,
    )


def _write(folder: Path, config: str, module: str | None) -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "config.pbtxt").write_text(config)
    if module is not None:
        shutil.copyfile(Path(__file__).with_name(module), folder / "1" / "model.py")
