"""The loading of the libraries whose answers a task's answers must equal. See Task.library."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from resources.tasks.base import CheckpointFiles
from resources.tasks.sentence_transformers import MODULES

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder, SentenceTransformer

#: transformers writes "no limit" as 1e30. Any length above this one means that there is no limit.
_NO_LIMIT = 10**6


def transformers_name(task: str) -> str:
    """Return the name and version under which users know a pipeline of transformers."""
    return f"transformers {version('transformers')}, pipeline({task!r})"


def sentence_transformers_name(kind: str) -> str:
    """Return the name and version under which users know a class of sentence-transformers."""
    return f"sentence-transformers {version('sentence-transformers')}, {kind}"


def transformers_pipeline(
    task: str, files: CheckpointFiles, auto_class: Any, tokenizer: Any, most_tokens: int, **load: Any
) -> Any:
    """Load the pipeline of transformers for a task, in fp32.

    If the tokenizer's own files name no limit, the tokenizer truncates to `most_tokens`.
    """
    import torch
    from transformers import pipeline

    model = auto_class.from_pretrained(files.folder, dtype=torch.float32, local_files_only=True, **load)
    if tokenizer.model_max_length > _NO_LIMIT:
        tokenizer.model_max_length = most_tokens
    return pipeline(task, model=model, tokenizer=tokenizer, device="cpu")


def sentence_transformer(
    files: CheckpointFiles,
    tokenizer: Any,
    most_tokens: int,
    *,
    chosen_tokens: int | None,
    pooling: str,
    normalize: bool,
    **load: Any,
) -> SentenceTransformer:
    """Load sentence-transformers' embedder in fp32, with the given tokenizer in place of its own. See `_served`.

    `pooling` and `normalize` are the models file's choices for a checkpoint without modules.json. They are ignored for
    a checkpoint with modules.json.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    model = SentenceTransformer(str(files.folder), device="cpu", local_files_only=True, **_given(load, torch.float32))
    if not (files.folder / MODULES).is_file() and (pooling != "mean" or normalize):
        width = model[0].get_embedding_dimension()
        modules = [model[0], Pooling(width, pooling), *([Normalize()] if normalize else [])]
        model = SentenceTransformer(modules=modules, device="cpu")
    return _served(model, tokenizer, most_tokens, chosen_tokens)


def cross_encoder(files: CheckpointFiles, tokenizer: Any, most_tokens: int, **load: Any) -> CrossEncoder:
    """Load sentence-transformers' reranker in fp32, with the given tokenizer in place of its own. See `_served`."""
    import torch
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(files.folder), device="cpu", local_files_only=True, **_given(load, torch.float32))
    return _served(model, tokenizer, most_tokens, None)


def _given(load: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """Return arguments of `from_pretrained` in the form in which sentence-transformers passes them on."""
    inside = {name: value for name, value in load.items() if name != "trust_remote_code"}
    return {"trust_remote_code": load["trust_remote_code"], "model_kwargs": {"dtype": dtype, **inside}}


def _served(model: Any, tokenizer: Any, most_tokens: int, chosen: int | None) -> Any:
    """Give the model the tokenizer that is served, which truncates where the library itself would.

    Args:
        model: The model of sentence-transformers.
        tokenizer: The tokenizer that is served.
        most_tokens: The release's limit, which applies if neither the library nor the models file has one.
        chosen: The models file's limit.
    """
    limits = [limit for limit in (model.max_seq_length, chosen) if limit]
    tokenizer.model_max_length = min(limits, default=most_tokens)
    model[0].processor = tokenizer
    return model
