"""The old place of orchestration.ui.webserver, which existing deployments start with `python -m`."""

import sys

from orchestration.ui.webserver import main

if __name__ == "__main__":
    sys.exit(main())
