"""`python -m qins.cli`."""

from . import main

main()
