"""Fill-mask: the tokens that a masked language model would write in place of a mask."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from resources.pipelines.limits import RequestLimits
from resources.tasks.base import (
    CheckpointFiles,
    Gates,
    Library,
    Metrics,
    Options,
    SpecialTokens,
    Task,
    at_least,
    at_most,
    is_near,
    load_pretrained,
)
from resources.tasks.grading import require
from resources.tasks.heads import mask_filler
from resources.tasks.libraries import transformers_name, transformers_pipeline
from resources.tasks.samples import masked_items

if TYPE_CHECKING:
    import numpy as np
    import torch

    from resources.pipelines.base import Item
    from resources.pipelines.tokenization import TextEncoder


#: Two tokens whose probabilities differ by less than this share have no order.
_TIE = 1e-3


class FillMaskGates(Gates):
    """The gates of fill-mask.

    Args:
        token_agreement: The share of masks for which PyTorch's best token comes first.
        score_error: The largest error of the score of a token that both list.
    """

    token_agreement: float = at_least(0.98)
    score_error: float = at_most(0.05, high=1.0)


class FillMaskOptions(Options):
    """The options of fill-mask.

    Args:
        top_k: The number of candidates for each mask.
    """

    top_k: int = Field(default=5, ge=1, le=1000)


class FillMaskTask(Task):
    """The task with input TEXT, which holds masks, and output RESULT.

    RESULT is a JSON list of candidates for one mask, and a list of such lists for several masks.
    """

    name: ClassVar[str] = "fill-mask"
    gates: ClassVar[type[Gates]] = FillMaskGates
    options: ClassVar[type[Options]] = FillMaskOptions
    extra_inputs: ClassVar[tuple[str, ...]] = ("mask_position",)
    fields: ClassVar[tuple[str, ...]] = ("text", "answer")

    def example(self, settings: dict[str, Any]) -> str:
        # The checkpoint chooses the token, and users paste the line into a shell.
        return shlex.quote(f"any text with a {settings['mask_token']}")

    def check(self, files: CheckpointFiles) -> None:
        if not files.architecture.endswith("ForPreTraining"):  # BERT's class has the same head and one more
            files.require_head(self.name, "ForMaskedLM", "a masked language model's head")

    def output(self, files: CheckpointFiles) -> str:
        return "token_probabilities"

    def module(self, files: CheckpointFiles, **load: Any) -> torch.nn.Module:
        from transformers import AutoModelForMaskedLM

        return mask_filler(load_pretrained(AutoModelForMaskedLM, files, **load))

    def settings(self, files: CheckpointFiles, options: Options, tokens: SpecialTokens) -> dict[str, Any]:
        if tokens.mask_id is None:
            raise files.refuse("its tokenizer has no mask token", "Save the tokenizer with its mask_token")
        settings = super().settings(files, options, tokens)
        return {
            **settings,
            "mask_id": tokens.mask_id,
            "mask_token": tokens.mask_token,
            "pad_id": tokens.pad_id,
            "clean_up": tokens.clean_up,
        }

    def library(
        self, files: CheckpointFiles, settings: dict[str, Any], tokenizer: Any, encoder: TextEncoder, **load: Any
    ) -> Library:
        from transformers import AutoModelForMaskedLM

        fill = transformers_pipeline(self.name, files, AutoModelForMaskedLM, tokenizer, encoder.max_tokens, **load)

        def answer(item: Item) -> Any:
            # The pipeline does not truncate, and the model cannot take a text that is too long.
            if len(fill.tokenizer(item["TEXT"])["input_ids"]) > encoder.max_tokens:
                return None
            return fill(item["TEXT"], top_k=settings["top_k"])

        return Library(transformers_name(self.name), answer)

    def difference(self, settings: dict[str, Any], expected: Any, found: Any) -> str:
        if len(_by_mask(expected)) != len(_by_mask(found)):
            return f"{len(_by_mask(found))} masks, and not {len(_by_mask(expected))}"
        for wanted, given in zip(_by_mask(expected), _by_mask(found), strict=True):
            if why := _unlike(wanted, given):
                return why
        return ""

    def items(self, settings: dict[str, Any], max_tokens: int) -> list[Item]:
        return masked_items(settings["mask_token"], max_tokens)

    def read(self, settings: dict[str, Any], line: dict[str, Any]) -> list[tuple[Item, Any]]:
        most = RequestLimits().masks
        (text,) = require(line, "text")
        masks = text.count(settings["mask_token"])
        if not masks:
            raise ValueError(f"'text' holds no mask; write {settings['mask_token']}")
        if masks > most:
            raise ValueError(f"'text' holds {masks} masks; give at most {most}")
        if "answer" in line and masks != 1:
            raise ValueError(f"'text' holds {masks} masks, and 'answer' is for one")
        return [({"TEXT": text}, require(line, "answer")[0] if "answer" in line else None)]

    def grade(
        self, settings: dict[str, Any], items: Sequence[Item], right: Sequence[Any], answers: Sequence[Any]
    ) -> Metrics:
        same = [
            answer[0]["token_str"].strip() == word.strip()
            for word, answer in zip(right, answers, strict=True)
            if word is not None
        ]
        return {"accuracy": sum(same) / len(same)} if same else {}

    def odd_items(self, settings: dict[str, Any], text: str) -> list[Item]:
        mask = settings["mask_token"]
        return [{"TEXT": f"{text} {mask}"}, {"TEXT": f"{mask} {text} {mask}"}]

    def refused_items(self, settings: dict[str, Any]) -> list[Item]:
        return [{"TEXT": "no mask"}, {"TEXT": ""}]

    def scores(self, settings: dict[str, Any], baseline: Sequence[Any], answers: Sequence[Any]) -> np.ndarray:
        import numpy as np

        return np.array([_likeness(first, second) for first, second in zip(baseline, answers, strict=True)])

    def compare(
        self, settings: dict[str, Any], items: Sequence[Item], baseline: Sequence[Any], answers: Sequence[Any]
    ) -> Metrics:
        masks = [
            pair
            for first, second in zip(baseline, answers, strict=True)
            for pair in zip(_by_mask(first), _by_mask(second), strict=True)
        ]
        same = sum(first[0]["token"] == second[0]["token"] for first, second in masks)
        return {
            "token_agreement": same / len(masks),
            "score_error": max(_error(first, second) for first, second in masks),
        }


def _unlike(wanted: list[dict[str, Any]], given: list[dict[str, Any]]) -> str:
    """Return how the candidates for a mask differ from the library's, or an empty text if they are the same.

    A candidate may be missing only if it is as likely as the last given candidate.
    """
    if len(wanted) != len(given):
        return f"{len(given)} candidates, and not {len(wanted)}"
    if any(not _is_tie(first, second) and first < second for first, second in pairwise(one["score"] for one in given)):
        return "candidates that are not in the order of their scores"
    by_token = {one["token"]: one for one in given}
    for one in wanted:
        same = by_token.get(one["token"])
        if same is None:
            if not _is_tie(one["score"], given[-1]["score"]):
                return f"no {one['token_str']!r}, whose score is {one['score']:.6g}"
        elif not (_is_tie(one["score"], same["score"]) and is_near(one["score"], same["score"])):
            return f"{one['token_str']!r} with score {same['score']:.6g}, and not {one['score']:.6g}"
        else:
            for name in ("token_str", "sequence"):
                if one[name] != same[name]:
                    return f"{name} {same[name][:60]!r}, and not {one[name][:60]!r}"
    return ""


def _is_tie(first: float, second: float) -> bool:
    return abs(first - second) <= _TIE * max(first, second)


def _by_mask(answer: list[Any]) -> list[list[dict[str, Any]]]:
    return answer if isinstance(answer[0], list) else [answer]


def _error(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> float:
    """Return the largest difference of the scores of a token that both list, or 0 if they have no token in common.

    The gate `token_agreement` covers that last case.
    """
    found = {candidate["token"]: candidate["score"] for candidate in second}
    return max(
        (abs(item["score"] - found[item["token"]]) for item in first if item["token"] in found),
        default=0.0,
    )


def _likeness(first: list[Any], second: list[Any]) -> float:
    pairs = list(zip(_by_mask(first), _by_mask(second), strict=True))
    return min(
        1.0 - _error(expected, found) if expected[0]["token"] == found[0]["token"] else 0.0 for expected, found in pairs
    )
