"""The check that a tokenizer.json made from older files gives the same tokens as those files.

Each kind of file is read a second time by code other than transformers': SentencePiece's own library, the WordPiece
implementation that BERT was released with, and byte-pair encoding as GPT-2's paper describes it. Only child processes
import this module.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from resources.errors import CheckpointError
from resources.tasks.samples import rare_texts, sample_texts

#: The pattern of the words into which GPT-2 cuts a text before it merges byte pairs.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
#: One in so many of the usual texts is checked. A wrong conversion shows first at rare characters, and all of the rare
#: texts are checked.
_EVERY = 8


def require_right_conversion(folder: Path, made: Any) -> None:
    """Check that the tokenizer that transformers made from a folder's older files gives the same tokens as those files.

    Files that only transformers can read are not checked.

    Args:
        folder: The folder with the older files.
        made: transformers' tokenizer.

    Raises:
        CheckpointError: The tokenizer gives other tokens for some texts.
    """
    cut = _cutter(folder, made)
    if cut is None:
        return
    texts = [text for text in (*rare_texts(), *sample_texts()[::_EVERY]) if text]
    wrong = [text for text in texts if _tokens(made, text) != cut(text)]
    if wrong:
        first = wrong[0]
        raise CheckpointError(
            f"the tokenizer that transformers makes from the older tokenizer files gives other tokens than those files "
            f"do for {len(wrong)} of {len(texts)} texts. For the first one, {first[:60]!r}, it gives "
            f"{_tokens(made, first)[:8]} instead of {cut(first)[:8]}. Give the checkpoint with a tokenizer.json that "
            "its author made."
        )


def take_normalizer(folder: Path, made: Any) -> bool:
    """Give a tokenizer that transformers made from a SentencePiece model the normalization rules of that model.

    transformers 5 gives some classes rules of its own instead. For example, DeBERTa v2 gets NFC, although the model was
    trained with nmt_nfkc.

    Returns:
        Whether the folder has such rules. If so, the tokenizer now follows them.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, normalizers

    pieces = sorted(folder.glob("*.model"))
    if not pieces or type(made.backend_tokenizer.model).__name__ != "Unigram":
        return False
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(pieces[0].read_bytes())
    rules = model.normalizer_spec
    if not rules.precompiled_charsmap:
        return False
    spaces = [normalizers.Replace(Regex(" {2,}"), " ")] if rules.remove_extra_whitespaces else []
    made.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Strip(), normalizers.Precompiled(rules.precompiled_charsmap), *spaces]
    )
    return True


def _tokens(made: Any, text: str) -> list[str]:
    encoding = made.backend_tokenizer.encode(text, add_special_tokens=False)
    unknown = (made.unk_token_id, getattr(made.backend_tokenizer.model, "unk_id", None))
    return _once(
        [
            made.unk_token if number in unknown else token
            for number, token in zip(encoding.ids, encoding.tokens, strict=True)
        ],
        made.unk_token,
    )


def _once(tokens: list[str], unknown: str | None) -> list[str]:
    """Replace each run of unknown tokens by one, because libraries differ in whether they merge such runs."""
    return [token for place, token in enumerate(tokens) if not (place and token == unknown == tokens[place - 1])]


def _cutter(folder: Path, made: Any) -> Callable[[str], list[str]] | None:
    """Return a function that cuts a text into tokens by the folder's older files.

    The result is None if only transformers can read them.
    """
    pieces = sorted(folder.glob("*.model"))
    if (folder / "vocab.txt").is_file() and type(made.backend_tokenizer.model).__name__ == "WordPiece":
        return _word_pieces(folder / "vocab.txt", made)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        state = json.loads(made.backend_tokenizer.to_str())["pre_tokenizer"] or {}
        # Other byte-pair encodings merge the letters of words, each by rules of its own (HerBERT, CLIP).
        return _byte_pairs(folder, made, state) if state.get("type") == "ByteLevel" else None
    return _sentence_pieces(pieces[0], made) if pieces else None


def _sentence_pieces(file: Path, made: Any) -> Callable[[str], list[str]]:
    from sentencepiece import SentencePieceProcessor

    processor, prepared = SentencePieceProcessor(model_file=str(file)), _preparation(made)

    def cut(text: str) -> list[str]:
        ids = processor.encode(prepared(text))
        tokens = [made.unk_token if processor.is_unknown(number) else processor.id_to_piece(number) for number in ids]
        return _once(tokens, made.unk_token)

    return cut


def _preparation(made: Any) -> Callable[[str], str]:
    """Return the normalization that a tokenizer's class does before SentencePiece's own rules.

    For example, ALBERT's class removes accents.
    """
    from tokenizers import Tokenizer

    state = json.loads(made.backend_tokenizer.to_str())["normalizer"] or {}
    parts = state.get("normalizers", [state])
    kinds = [part.get("type") for part in parts]
    if "Precompiled" not in kinds[1:]:
        return lambda text: text
    model = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    before = {"type": "Sequence", "normalizers": parts[: kinds.index("Precompiled")]}
    normalizer = Tokenizer.from_str(json.dumps({"normalizer": before, "model": model})).normalizer
    return lambda text: str(normalizer.normalize_str(text))


def _word_pieces(file: Path, made: Any) -> Callable[[str], list[str]]:
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    settings = json.loads(made.backend_tokenizer.to_str()).get("normalizer") or {}
    tokenizer = BertTokenizerLegacy(
        str(file),
        do_lower_case=settings.get("lowercase", True),
        strip_accents=settings.get("strip_accents"),
        tokenize_chinese_chars=settings.get("handle_chinese_chars", True),
        unk_token=made.unk_token,
    )
    return lambda text: _once(list(tokenizer.tokenize(text)), made.unk_token)


def _byte_pairs(folder: Path, made: Any, pre_tokenizer: dict[str, Any]) -> Callable[[str], list[str]]:
    """Return a function that encodes a text by byte-pair encoding of its UTF-8 bytes.

    In each step, the neighbours that come first in merges.txt are joined. Method: Radford et al., "Language Models are
    Unsupervised Multitask Learners" (2019), section 2.2.
    """
    import regex

    lines = (folder / "merges.txt").read_text(encoding="utf-8").replace("\r\n", "\n").split("\n")
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    rank = {pair: place for place, pair in enumerate(pairs)}
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    letters = _letters_of_bytes()
    # A vocabulary of all bytes has no unknown parts. With a smaller one, an unknown part becomes the model's unknown
    # token, or is dropped if the model names none.
    unknown = [made.unk_token] if made.backend_tokenizer.model.unk_token else []
    space = pre_tokenizer.get("add_prefix_space", False)

    def cut(text: str) -> list[str]:
        tokens: list[str] = []
        for word in regex.findall(_WORDS, f" {text}" if space and not text.startswith(" ") else text):
            parts = [letters[byte] for byte in word.encode()]
            while len(parts) > 1:
                found = min(pairwise(parts), key=lambda pair: rank.get(pair, len(rank)))
                if found not in rank:
                    break
                parts = _joined(parts, found)
            tokens += [token for part in parts for token in ([part] if part in vocabulary else unknown)]
        return _once(tokens, made.unk_token)

    return cut


def _joined(parts: list[str], pair: tuple[str, str]) -> list[str]:
    found: list[str] = []
    place = 0
    while place < len(parts):
        if tuple(parts[place : place + 2]) == pair:
            found.append("".join(pair))
            place += 2
        else:
            found.append(parts[place])
            place += 1
    return found


def _letters_of_bytes() -> dict[int, str]:
    """Return GPT-2's letter for each byte: the byte's own character if it is printable, else one from 256 up."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {**{byte: chr(byte) for byte in printed}, **{byte: chr(256 + place) for place, byte in enumerate(others)}}
