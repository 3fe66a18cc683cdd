"""The process that looks aside."""

from resources.checkpoints.watch.background import main

main()
