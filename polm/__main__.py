"""`python -m polm`: the command line."""

from polm.apps.cli import main

main()
