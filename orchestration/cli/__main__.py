"""`python -m orchestration.cli`, which is `refinery`."""

import sys

from orchestration.cli import main

sys.exit(main())
