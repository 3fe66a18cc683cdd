"""The permissions that the catalog's entry of a model gives to loading.

This module imports nothing of the project, so that every package can import it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Trust:
    """The permissions to run a checkpoint's own code and to read weights from pickles.

    Both run code on this machine. Only the user gives them, in the catalog's entry (`ModelEntry.trust`). Records hold
    the same two fields, which say what was allowed when a checkpoint was collected. Records lie in a store that others
    may write, so no decision relies on them.
    """

    allow_pickle: bool = False
    trust_remote_code: bool = False
    #: Whether a checkpoint may hold weights that nothing reads. Otherwise it is refused. This is not dangerous, but the
    #: user decides it as well.
    allow_unused: bool = False

    @property
    def load_arguments(self) -> dict[str, Any]:
        """The arguments that transformers' `from_pretrained` gets beyond the folder."""
        return {"trust_remote_code": self.trust_remote_code, "use_safetensors": None if self.allow_pickle else True}
