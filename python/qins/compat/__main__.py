"""Run a script of the seed."""

from . import main

main()
