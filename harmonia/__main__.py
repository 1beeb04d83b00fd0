"""`python -m harmonia`."""

from harmonia.cli import main

main(prog_name="harmonia")
