"""`python -m orki_agent`: the `orki-agent` command."""

from orki_agent._cli import main

if __name__ == "__main__":
    main(prog_name="orki-agent")
