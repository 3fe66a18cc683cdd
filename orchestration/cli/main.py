"""The entry point of the command line. It turns an error of a command into one line and an exit status."""

from __future__ import annotations

import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib import import_module

from orchestration.cli.arguments import parser
from orchestration.terminal.output import printable_output
from resources.errors import RefineryError, disk_trouble

SUCCESS, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit status.

    Returns:
        0 for success, 1 for failure, 2 for a wrong command line, 130 for Ctrl-C.
    """
    with printable_output():
        options = parser().parse_args(arguments)
        module, _, name = options.command.partition(":")
        try:
            from orchestration.settings import complete_environment

            complete_environment(os.environ)
            command: Callable[[Namespace], int] = getattr(import_module(module), name)
            code = command(options)
            sys.stdout.flush()
            return code
        except RefineryError as error:
            print(f"refinery: {error}", file=sys.stderr)
            return FAILURE
        except KeyboardInterrupt:
            print("refinery: interrupted. No unfinished files were left behind.", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:  # as in `refinery models | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return SUCCESS
        except Exception as error:
            trouble = disk_trouble(error)
            if trouble:
                print(f"refinery: {trouble}", file=sys.stderr)
            else:  # a defect; printed here, so that control characters in its text are escaped as well
                traceback.print_exc()
            return FAILURE
