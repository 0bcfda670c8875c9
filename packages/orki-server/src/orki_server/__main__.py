"""Run the `orki` command as `python -m orki_server`."""

from orki_server._cli.root import main

main()
