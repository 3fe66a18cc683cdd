"""What the catalog's entry of a model lets loading do. A leaf, so that every room can take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Trust:
    """Whether a checkpoint's own code may run, and whether its weights may be pickles. Both run code on this machine.

    Only the user says so, in the catalog's entry: ModelEntry.trust. Records hold the same two fields, which say what
    was allowed when a checkpoint was collected. They lie in a store that others may write, so nothing is decided by
    them.
    """

    allow_pickle: bool = False
    trust_remote_code: bool = False
    #: Not dangerous, but the user's to say as well: weights that nothing reads are no reason to refuse a checkpoint.
    allow_unused: bool = False

    @property
    def load_arguments(self) -> dict[str, Any]:
        """What transformers' `from_pretrained` gets beyond the folder."""
        return {"trust_remote_code": self.trust_remote_code, "use_safetensors": None if self.allow_pickle else True}
