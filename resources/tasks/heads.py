"""The modules that wrap a transformers model for export. They turn logits into the pipelines' numbers, in fp32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Activation = Literal["identity", "sigmoid", "softmax"]


def classifier(model: torch.nn.Module, activation: Activation) -> torch.nn.Module:
    """Return a module that applies the activation over the last axis of the model's logits.

    The logits are `[batch, width]` or `[batch, sequence, width]`.
    """
    import torch

    class Classifier(torch.nn.Module):
        """The module that turns token ids into activated logits."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            token_type_ids: torch.Tensor | None = None,
        ) -> torch.Tensor:
            logits = _logits(self.model, _given(input_ids, attention_mask, token_type_ids)).float()
            if activation == "sigmoid":
                return torch.sigmoid(logits)
            return torch.softmax(logits, dim=-1) if activation == "softmax" else logits

    return Classifier().eval()


def span_finder(model: torch.nn.Module) -> torch.nn.Module:
    """Return a module that computes the logits of start and end, `[batch, sequence, 2]`."""
    import torch

    class SpanFinder(torch.nn.Module):
        """The module that turns token ids into two logits for each token."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            token_type_ids: torch.Tensor | None = None,
        ) -> torch.Tensor:
            answer = self.model(**_given(input_ids, attention_mask, token_type_ids))
            return torch.stack([answer.start_logits, answer.end_logits], dim=-1).float()

    return SpanFinder().eval()


def mask_filler(model: torch.nn.Module) -> torch.nn.Module:
    """Return a module that computes probabilities over the vocabulary at one position a row, `[batch, vocabulary]`.

    The head is as wide as the vocabulary and costs as much as several layers. It works on each position alone, so the
    encoder's other positions are dropped before it.
    """
    import torch

    class MaskFiller(torch.nn.Module):
        """The module that turns token ids and `mask_position` `[batch, 1]` into probabilities."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(
            self,
            input_ids: torch.Tensor,
            attention_mask: torch.Tensor,
            mask_position: torch.Tensor,
            token_type_ids: torch.Tensor | None = None,
        ) -> torch.Tensor:
            def only_the_mask(module: torch.nn.Module, inputs: Any, answer: Any) -> Any:
                del module, inputs
                hidden = answer.last_hidden_state
                index = mask_position.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
                answer.last_hidden_state = torch.gather(hidden, 1, index)
                return answer

            encoder: Any = self.model.base_model
            hook = encoder.register_forward_hook(only_the_mask)
            try:
                logits = self.model(**_given(input_ids, attention_mask, token_type_ids)).logits
            finally:
                hook.remove()
            return torch.softmax(logits[:, 0].float(), dim=-1)

    return MaskFiller().eval()


def _logits(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the classifier's logits.

    BART and its relatives classify by the last end token of a row. transformers takes only batches whose rows have
    equally many end tokens, and a pair has more of them than a text. So this function finds the last one in each row.
    """
    import torch

    if not (model.config.is_encoder_decoder and hasattr(model, "classification_head")):
        logits: torch.Tensor = model(**given).logits
        return logits
    hidden = model.model(**given).last_hidden_state
    ends = given["input_ids"] == model.config.eos_token_id
    last = (ends * torch.arange(ends.shape[1], device=ends.device)).amax(dim=1)
    index = last[:, None, None].expand(-1, 1, hidden.shape[-1])
    return model.classification_head(torch.gather(hidden, 1, index)[:, 0])


def _given(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    given = {"input_ids": input_ids, "attention_mask": attention_mask}
    return given if token_type_ids is None else {**given, "token_type_ids": token_type_ids}
