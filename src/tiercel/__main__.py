"""python -m tiercel."""

from tiercel.commands.cli import main

main()
