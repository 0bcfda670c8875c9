"""`python -m orki_server`: the `orki` command."""

from orki_server.cli import main

main()
