"""The former place of orchestration.ui.webserver. Existing deployments still start it with `python -m`."""

import sys

from orchestration.ui.webserver import main

if __name__ == "__main__":
    sys.exit(main())
