"""What the server of resources.processes.isolation imports before it forks; see there. Import it nowhere else."""

import errno
import os
import socket
import sys
from multiprocessing import reduction
from types import TracebackType

# Tokenizers warns, and turns itself single-threaded, when a process forks after using it; the server never uses it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Children read checkpoints that were fetched before. Whatever a checkpoint's files ask for, they fetch nothing more: no
# second model, no configuration, and no native code for attention (transformers' "kernels").
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["USE_HUB_KERNELS"] = "NO"

import onnx
import onnx_ir
import onnxruntime
import onnxruntime.quantization
import onnxscript.rewriter.ort_fusions
import torch
import torch.onnx
import transformers.modeling_utils
import transformers.models.auto.modeling_auto
import transformers.models.auto.tokenization_auto

_server = os.getpid()
_recvfds = reduction.recvfds


def _recvfds_or_aborted(sock: socket.socket, size: int) -> list[int]:
    """What multiprocessing's server reads a request with. A parent that was interrupted after it connected, and before
    it sent anything, would end the server, and every child with it; of an aborted connection the server says nothing.
    """
    try:
        return _recvfds(sock, size)
    except EOFError:
        raise ConnectionAbortedError(errno.ECONNABORTED, "the parent left before it asked for a child") from None


reduction.recvfds = _recvfds_or_aborted


def _without_orphans(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say nothing of a child whose parent was interrupted before it had sent what the child is to do."""
    if kind is not EOFError or os.getpid() == _server:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _without_orphans  # multiprocessing calls it for what fails in a child before our own code runs

__all__ = ["onnx", "onnx_ir", "onnxruntime", "onnxscript", "torch", "transformers"]
