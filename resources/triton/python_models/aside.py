"""Runs inside Triton, copied beside each `model.py`: imports that do not slow down those who are being answered.

Nearly all that a small model needs the processor for while it loads are imports.
"""

import importlib
import os
import threading
from contextlib import suppress

#: A tenth of what others get who want the core too. At 19 it would be a seventieth, and on a server that is busy a load
#: would hardly end.
NICE = 10


def import_aside(*modules):
    """Import the modules in a thread of low priority, and return when that is done.

    The priority is that thread's own: Linux has one for each, and a process without privileges cannot raise it again.
    Threads that a module starts when it is imported keep it (those of numpy's BLAS, which no model here calls). What
    cannot be imported is left to whoever needs it, who then says so.
    """
    thread = threading.Thread(target=_import, args=modules)
    thread.start()
    thread.join()


def _import(*modules):
    with suppress(OSError):  # another system than Linux
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
    for module in modules:
        with suppress(Exception):
            importlib.import_module(module)
