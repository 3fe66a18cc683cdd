"""Imports in a thread of low priority, so that loading a model does not slow down running requests.

This module runs inside Triton, copied beside each `model.py`. While a small model loads, it spends nearly all of its
processor time on imports.
"""

import importlib
import os
import threading
from contextlib import suppress

#: At this niceness the thread gets a tenth of the time of another thread that wants the same core. At 19 it would be a
#: seventieth, and on a busy server a load would hardly end.
NICE = 10


def import_aside(*modules):
    """Import the modules in a thread of low priority, and return when that is done.

    Linux has a priority for each thread, and a process without privileges cannot raise it again, so only the importing
    thread gets the low one. Threads that a module starts on import inherit it; those are the threads of numpy's BLAS,
    which no model here calls. Errors are ignored, because the code that needs the module imports it again and raises
    them.
    """
    thread = threading.Thread(target=_import, args=modules)
    thread.start()
    thread.join()


def _import(*modules):
    with suppress(OSError):  # systems other than Linux have no priority per thread
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
    for module in modules:
        with suppress(Exception):
            importlib.import_module(module)
