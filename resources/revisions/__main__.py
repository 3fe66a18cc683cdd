"""The process that looks aside."""

from resources.revisions.aside import main

main()
