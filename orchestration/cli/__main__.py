"""The program `python -m orchestration.cli`, which is the same as `refinery`."""

import sys

from orchestration.cli import main

if __name__ == "__main__":
    sys.exit(main())
