"""`python -m pgebus.cli`: the same as `pgebus`, where scripts are not on the path."""

from pgebus.cli import main

main()
