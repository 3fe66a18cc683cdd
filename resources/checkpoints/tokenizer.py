"""What transformers and tokenizers make of a checkpoint's copy, found out in a child process."""

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

#: Of parameters beyond one for each byte of the stored weights: heads and poolers that a checkpoint may lack.
_SPARE_PARAMETERS = 2**24
#: Any text will do: whether a tokenizer works at all.
_TEXT = "Does it work?"


@dataclass(frozen=True)
class Signature:
    """The arrays that the model takes, and what the tokenizer is like. frame: see `frame_of`.

    truncation_side: `right`, or `left` where the end of a text is kept.
    """

    inputs: tuple[str, ...]
    pad_id: int
    vocabulary_size: int
    tokens: SpecialTokens
    frame: dict[str, Any]
    truncation_side: str


def prepare_tokenizer(folder: Path, model: str, trust_remote_code: bool, stored_bytes: int) -> Signature:
    """Write tokenizer.json where only older files are there, and find which arrays the model takes.

    stored_bytes: of the weights. Raises CheckpointError.
    """
    from tokenizers import Tokenizer

    config, accepted = _model(folder, model, trust_remote_code, stored_bytes)
    file = TOKENIZER if (folder / TOKENIZER).is_file() else slow_tokenizer(folder)
    try:
        tokenizer = _tokenizer(folder, trust_remote_code, convert=file != TOKENIZER)
        # DeBERTa's tokenizers make segment ids although most of its models have no table for them (type_vocab_size 0).
        segments = "token_type_ids" in tokenizer.model_input_names and getattr(config, "type_vocab_size", 1) != 0
        # Of byte-pair encodings transformers never removes spaces, whatever their configuration says.
        pieces = type(tokenizer.backend_tokenizer.model).__name__ != "BPE"
        tokens = SpecialTokens(
            pad_id=tokenizer.pad_token_id,
            clean_up=bool(tokenizer.clean_up_tokenization_spaces) and pieces,
            unknown_id=tokenizer.unk_token_id,
            mask_id=tokenizer.mask_token_id,
            mask_token=tokenizer.mask_token,
        )
        vocabulary_size = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=True)
        # Padding and truncation are whatever the last training run left there.
        plain = Tokenizer.from_file(str(folder / TOKENIZER))
        plain.no_padding()
        plain.no_truncation()
        frame = frame_of(plain)
    except CheckpointError as error:
        raise CheckpointError(f"{model}: {error}") from error
    except BaseException as error:  # a panic of the library in Rust is no Exception
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
    """Find what a tokenizer (of the `tokenizers` library) puts around a text and between two: see TextEncoder."""
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
    """The model's configuration, and the arguments that its forward takes. Raises CheckpointError."""
    import torch
    from transformers import AutoConfig, AutoModel

    trust = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **trust)
        # On the meta device nothing is allocated: only the signature and the sizes are wanted.
        with torch.device("meta"):
            made = AutoModel.from_config(config, **trust)
        parameters = sum(parameter.numel() for parameter in made.parameters())
        accepted = {*inspect.signature(made.forward).parameters}
    except BaseException as error:
        raise CheckpointError(
            f"{model}: transformers {version('transformers')} cannot make a model of its config.json: "
            f"{first_line(error)}. Use a model type that it knows, or a newer transformers."
        ) from error
    if parameters > stored_bytes + _SPARE_PARAMETERS:
        raise CheckpointError(
            f"{model}: config.json describes a model of {parameters} parameters, and its weights have {stored_bytes} "
            "bytes. Give the config.json that was saved with these weights."
        )
    return config, accepted


def _tokenizer(folder: Path, trust_remote_code: bool, *, convert: bool) -> Any:
    """The tokenizer that is served. convert: only older files are there, and tokenizer.json is to be made of them."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, TokenizersBackend

    if convert:
        made = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        if not isinstance(made, TokenizersBackend):
            raise CheckpointError(f"{only_in_python(type(made).__name__)}. {ONLY_IN_PYTHON_REMEDY}")
        try:
            require_right_conversion(folder, made)
        except CheckpointError:
            if not take_normalizer(folder, made):
                raise
            require_right_conversion(folder, made)
        made.backend_tokenizer.save(str(folder / TOKENIZER))
    # Releases read that file with tokenizers alone, and transformers takes only parts of it.
    Tokenizer.from_file(str(folder / TOKENIZER)).encode(_TEXT)
    return load_tokenizers(folder, trust_remote_code)[1]


def load_tokenizers(folder: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    """Load a tokenizer as transformers does by itself, and with tokenizer.json as it was trained.

    transformers 5 takes parts of that file alone for some architectures, and makes the others as it thinks they should
    be: DeBERTa's normalizer of SentencePiece becomes NFC. Everything that tokenizer.json does not say (names of special
    tokens, limits, sides, the arrays that the model takes) is the same in both.
    """
    from transformers import AutoTokenizer, TokenizersBackend

    try:
        own = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception:  # of a class that exists only in Python, say, whose author has made a tokenizer.json
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
    """The id that pads: the model's own, else the tokenizer's, else 0. Raises CheckpointError where it has no row."""
    known = (getattr(config, "pad_token_id", None), tokenizer.pad_token_id, 0)
    pad = next(value for value in known if value is not None)
    rows = getattr(config, "vocab_size", None)
    if not isinstance(pad, int) or pad < 0 or (rows is not None and pad >= rows):
        raise CheckpointError(
            f"{model}: the pad id {pad!r:.60} is not a row of the model's embedding (vocab_size {rows}). "
            "Set pad_token_id in config.json to the id that the model was trained with."
        )
    return pad
