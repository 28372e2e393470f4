"""Run a script of the prototype."""

from . import main

main()
