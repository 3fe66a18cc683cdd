"""The modules that the server of resources.processes.isolation imports before it forks.

Import this module nowhere else.
"""

import errno
import os
import socket
import sys
from multiprocessing import reduction
from types import TracebackType

# If a process forks after it has used tokenizers, that library warns and becomes single-threaded. The server never
# uses it.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Children read checkpoints that were fetched before. They fetch nothing more, whatever a checkpoint's files ask for: no
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
    """Read a request for multiprocessing's server, and raise ConnectionAbortedError if the parent has gone.

    A parent may be interrupted after it has connected and before it has sent anything. The EOFError would end the
    server, and every child with it. The server ignores an aborted connection.
    """
    try:
        return _recvfds(sock, size)
    except EOFError:
        raise ConnectionAbortedError(errno.ECONNABORTED, "the parent left before it asked for a child") from None


reduction.recvfds = _recvfds_or_aborted


def _without_orphans(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught error, unless it is a child's whose parent was interrupted before it had sent any work."""
    if kind is not EOFError or os.getpid() == _server:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _without_orphans  # multiprocessing calls it for an error in a child before our code runs

__all__ = ["onnx", "onnx_ir", "onnxruntime", "onnxscript", "torch", "transformers"]
