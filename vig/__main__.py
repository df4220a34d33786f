"""`python -m vig` is the same program as `vig`."""

from vig.cli import main

main()
