"""The reasons why an artifact must be made again, in a few words for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from resources.artifacts.fingerprint import Fingerprint, is_pending
from resources.artifacts.records import Record
from resources.engines.specs import BASELINE

NEVER = "it was never made"
#: Readable names for parts of a fingerprint with unclear names.
_WORDS = {
    "weights": "the weights or their configuration",
    "tokenizer": "the tokenizer",
    "ids": "the tokenizer's vocabulary or longest text",
    "pipeline": "how answers are made of the engine's numbers",
    "checkpoint": "the tokenizer, or how answers are made of the engine's numbers",
    "items": "the evaluation requests",
    "right": "the right answers of the evaluation requests",
    "sample": "the sample of requests",
    "graph": "onnx_graph",
    "evaluation": "evaluation_set",
    "copy": "the checkpoint",
    "baseline": f"PyTorch ({BASELINE})",
    "engine": "the engine",
    "profiles": "the lengths that engines are tuned to",
}
#: The beginnings of the names of a tokenizer's files.
_TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "spiece", "sentencepiece")
_LONGEST_VALUE = 60


def after(*steps: str) -> tuple[str, ...]:
    """Return the reason of a step whose plan is known only once the other steps have run."""
    others = len(steps) - 1
    more = "" if not others else f" and {others} other{'' if others == 1 else 's'}"
    return (f"once {steps[0]}{more} {'are' if others else 'is'} made",)


def failure_of(record: Record) -> str:
    """Return why the record's step failed: the reason of an engine or report, or the problems of a graph."""
    return str(getattr(record, "reason", "") or " ".join(getattr(record, "problems", ())))


def reasons_of(now: Record | None, made_of: Fingerprint, damaged: tuple[str, ...]) -> Iterator[str]:
    """Yield the reasons why the current artifact is not the wanted one.

    It yields none if every part that may differ is not known yet.

    Args:
        now: The record of the current artifact, or None if there is none.
        made_of: The fingerprint of the wanted artifact.
        damaged: The names of the wanted artifact's files that are damaged.
    """
    if damaged:
        yield f"{', '.join(damaged)} is damaged"
        return
    if now is None:
        yield NEVER
    elif not now.made_of:
        yield "an older version of transformer-refinery made it, and did not note of what"
    elif now.digest == made_of.digest:
        yield "its files are gone"
    else:
        yield from differences(now.made_of, made_of.parts)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield the differences between the parts of two fingerprints, each in a few words.

    Parts that are not known yet are left out.
    """
    for name in sorted({*before, *now}, key=lambda part: (part == "code", part)):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(new, str) and is_pending(new):
            continue
        if isinstance(new, list) and any(isinstance(one, str) and is_pending(one) for one in new):
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _inner_differences(name, old, new)
        elif name == "device" and isinstance(old, str) and isinstance(new, str):
            yield _device_difference(old, new)
        elif _is_digest(old) or _is_digest(new):
            yield f"{_WORDS.get(name, name)} changed"
        else:
            yield _change(_WORDS.get(name, name), old, new)


def _inner_differences(name: str, old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    changed = [key for key in changed if not (isinstance(new.get(key), str) and is_pending(new[key]))]
    if not changed:
        return
    if name == "files":
        tokenizer = [file for file in changed if file.startswith(_TOKENIZER_FILES) or file.endswith(".model")]
        others = [file for file in changed if file not in tokenizer]
        if tokenizer:
            yield f"the tokenizer's files ({', '.join(tokenizer)})"
        if others:
            yield f"the checkpoint's files ({', '.join(others)})"
    elif name in ("code", "examiner"):
        yield f"the code of {', '.join(changed)}"
    elif name == "reports":
        yield f"the reports on {', '.join(changed)}"
    else:
        prefix = "" if name in ("libraries", "tokenizers") else f"{name}."
        for key in changed:
            if _is_digest(old.get(key)) or _is_digest(new.get(key)):
                yield f"{_WORDS.get(key, prefix + key)} changed"
            else:
                yield _change(f"{prefix}{key}", old.get(key), new.get(key))


def _change(name: str, old: Any, new: Any) -> str:
    was, will = (_text(value) for value in (old, new))
    return f"{name} {was} -> {will}" if max(len(was), len(will)) <= _LONGEST_VALUE else f"{name} changed"


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _device_difference(old: str, new: str) -> str:
    """Describe a change of device by those parts of its description (name, driver or cores) that differ."""
    was, will = old.split(", "), new.split(", ")
    if len(was) == len(will):
        both = [pair for pair in zip(was, will, strict=True) if pair[0] != pair[1]]
        was, will = [pair[0] for pair in both], [pair[1] for pair in both]
    return f"{', '.join(was)} -> {', '.join(will)}"


def _is_digest(value: Any) -> bool:
    if isinstance(value, list):
        return any(_is_digest(one) for one in value)
    if not isinstance(value, str):
        return False
    return value.startswith("sha256:") or (len(value) == 64 and set(value) <= set("0123456789abcdef"))
