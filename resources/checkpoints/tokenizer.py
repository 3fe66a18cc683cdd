"""The reading of a checkpoint's copy with transformers and tokenizers, in a child process."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from resources.checkpoints.conversion import require_right_conversion, take_normalizer
from resources.checkpoints.reading import TOKENIZER
from resources.checkpoints.validation import ONLY_IN_PYTHON_REMEDY, only_in_python, slow_tokenizer
from resources.errors import CheckpointError, first_line
from resources.tasks import SpecialTokens

#: A model may have one parameter for each byte of the stored weights, and this many more. The additional ones are those
#: of heads and poolers that a checkpoint may lack.
_SPARE_PARAMETERS = 2**24
#: A text that shows whether a tokenizer works at all. Any other text would do.
_TEXT = "Does it work?"


@dataclass(frozen=True)
class Signature:
    """The arrays that the model takes, and the properties of the tokenizer.

    Args:
        inputs: The names of the arrays, in their usual order.
        pad_id: The id that pads.
        vocabulary_size: The number of tokens, added ones included.
        tokens: The special tokens.
        frame: The ids around a text and between two texts; see `frame_of`.
        truncation_side: The side at which a long text is cut: `right`, or `left` to keep its end.
    """

    inputs: tuple[str, ...]
    pad_id: int
    vocabulary_size: int
    tokens: SpecialTokens
    frame: dict[str, Any]
    truncation_side: str


def prepare_tokenizer(folder: Path, model: str, trust_remote_code: bool, stored_bytes: int) -> Signature:
    """Write tokenizer.json if the folder has only older files, and find which arrays the model takes.

    Args:
        folder: The copy of the checkpoint.
        model: The model's name, for messages.
        trust_remote_code: Whether transformers may run the checkpoint's own code.
        stored_bytes: The size of the weights in bytes.

    Raises:
        CheckpointError: transformers cannot read the configuration or the tokenizer, or one of them does not fit the
            model.
    """
    from tokenizers import Tokenizer

    config, accepted = _model(folder, model, trust_remote_code, stored_bytes)
    file = TOKENIZER if (folder / TOKENIZER).is_file() else slow_tokenizer(folder)
    try:
        tokenizer = _tokenizer(folder, trust_remote_code, convert=file != TOKENIZER)
        # DeBERTa's tokenizers make segment ids although most of its models have no table for them (type_vocab_size 0).
        segments = "token_type_ids" in tokenizer.model_input_names and getattr(config, "type_vocab_size", 1) != 0
        # transformers never removes spaces from the texts of byte-pair encodings, whatever their configuration says.
        pieces = type(tokenizer.backend_tokenizer.model).__name__ != "BPE"
        tokens = SpecialTokens(
            pad_id=tokenizer.pad_token_id,
            clean_up=bool(tokenizer.clean_up_tokenization_spaces) and pieces,
            unknown_id=tokenizer.unk_token_id,
            mask_id=tokenizer.mask_token_id,
            mask_token=tokenizer.mask_token,
        )
        vocabulary_size = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=True)
        # The file still has the padding and truncation of the last training run.
        plain = Tokenizer.from_file(str(folder / TOKENIZER))
        plain.no_padding()
        plain.no_truncation()
        frame = frame_of(plain)
    except CheckpointError as error:
        raise CheckpointError(f"{model}: {error}") from error
    except BaseException as error:  # a panic of the Rust library is a BaseException
        raise CheckpointError(
            f"{model}: transformers cannot read its tokenizer ({file}): {first_line(error)}. Give the checkpoint with "
            f"a {TOKENIZER} that its author made."
        ) from error
    inputs = tuple(
        name
        for name in ("input_ids", "attention_mask", "token_type_ids")
        if name in accepted and (name != "token_type_ids" or segments)
    )
    return Signature(
        inputs=inputs,
        pad_id=_pad_id(model, config, tokenizer),
        vocabulary_size=vocabulary_size,
        tokens=tokens,
        frame=frame,
        truncation_side=tokenizer.truncation_side,
    )


def frame_of(tokenizer: Any) -> dict[str, Any]:
    """Find the ids that a tokenizer puts around a text and between two texts.

    Args:
        tokenizer: A tokenizer of the `tokenizers` library.

    Returns:
        The fields that TextEncoder reads.
    """
    row, pair = tokenizer.encode(_TEXT), tokenizer.encode(_TEXT, _TEXT)
    inside = [place for place, special in enumerate(row.special_tokens_mask) if not special]
    ends = max(place for place, number in enumerate(pair.sequence_ids) if number == 0)
    begins = pair.sequence_ids.index(1)
    return {
        "before": row.ids[: inside[0]],
        "after": row.ids[inside[-1] + 1 :],
        "between": pair.ids[ends + 1 : begins],
        "second_type": pair.type_ids[begins],
        "filler": row.ids[inside[0]],
    }


def _model(folder: Path, model: str, trust_remote_code: bool, stored_bytes: int) -> tuple[Any, set[str]]:
    """Return the model's configuration and the names of the arguments of its `forward`.

    Raises:
        CheckpointError: transformers cannot make the model, or config.json describes another model than the weights.
    """
    import torch
    from transformers import AutoConfig, AutoModel

    trust = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **trust)
        # Only the signature and the sizes are needed, and the meta device allocates no memory for weights.
        with torch.device("meta"):
            made = AutoModel.from_config(config, **trust)
        parameters = sum(parameter.numel() for parameter in made.parameters())
        accepted = {*inspect.signature(made.forward).parameters}
    except BaseException as error:
        raise CheckpointError(
            f"{model}: transformers {version('transformers')} cannot build a model from its config.json: "
            f"{first_line(error)}. Use a model type that this version supports, or a newer version of transformers."
        ) from error
    if parameters > stored_bytes + _SPARE_PARAMETERS:
        raise CheckpointError(
            f"{model}: config.json describes a model of {parameters} parameters, but the weights have only "
            f"{stored_bytes} bytes. Give the config.json that was saved with these weights."
        )
    return config, accepted


def _tokenizer(folder: Path, trust_remote_code: bool, *, convert: bool) -> Any:
    """Load the tokenizer that is served. If `convert` is true, make its tokenizer.json from older files first."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, TokenizersBackend

    if convert:
        made = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        if not isinstance(made, TokenizersBackend):
            raise CheckpointError(f"{only_in_python(type(made).__name__)}. {ONLY_IN_PYTHON_REMEDY}.")
        try:
            require_right_conversion(folder, made)
        except CheckpointError:
            if not take_normalizer(folder, made):
                raise
            require_right_conversion(folder, made)
        made.backend_tokenizer.save(str(folder / TOKENIZER))
    # Releases read the whole file with the tokenizers library, and transformers reads only parts of it. Both must work.
    Tokenizer.from_file(str(folder / TOKENIZER)).encode(_TEXT)
    return load_tokenizers(folder, trust_remote_code)[1]


def load_tokenizers(folder: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    """Load a tokenizer twice: as transformers loads it by default, and as tokenizer.json defines it.

    For some architectures, transformers 5 reads only parts of that file and replaces the others by defaults of its own.
    For example, it replaces DeBERTa's SentencePiece normalizer by NFC. Both tokenizers share everything that
    tokenizer.json does not define: the names of special tokens, limits, sides, and the arrays that the model takes.

    Returns:
        The default tokenizer and that of tokenizer.json.
    """
    from transformers import AutoTokenizer, TokenizersBackend

    try:
        own = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception:  # for example, the named class exists only in Python, and the author made a tokenizer.json too
        own = TokenizersBackend.from_pretrained(folder, local_files_only=True)
    trained = TokenizersBackend(
        tokenizer_file=str(folder / TOKENIZER),
        model_max_length=own.model_max_length,
        model_input_names=own.model_input_names,
        padding_side=own.padding_side,
        truncation_side=own.truncation_side,
        clean_up_tokenization_spaces=own.clean_up_tokenization_spaces,
        **own.special_tokens_map,
    )
    return own, trained


def _pad_id(model: str, config: Any, tokenizer: Any) -> int:
    """Return the id that pads: the model's own, else the tokenizer's, else 0.

    Raises:
        CheckpointError: The model's embedding has no row for the id.
    """
    known = (getattr(config, "pad_token_id", None), tokenizer.pad_token_id, 0)
    pad = next(value for value in known if value is not None)
    rows = getattr(config, "vocab_size", None)
    if not isinstance(pad, int) or pad < 0 or (rows is not None and pad >= rows):
        raise CheckpointError(
            f"{model}: the pad id {pad!r:.60} is not a row of the model's embedding (vocab_size {rows}). "
            "Set pad_token_id in config.json to the id that the model was trained with."
        )
    return pad
