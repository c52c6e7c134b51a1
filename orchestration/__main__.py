"""`python -m orchestration` is the command `md4`."""

from orchestration.cli import main

main()
