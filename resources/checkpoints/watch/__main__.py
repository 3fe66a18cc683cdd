"""The background process that looks at one source."""

from resources.checkpoints.watch.background import main

main()
