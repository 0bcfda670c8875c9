"""`python -m orki_agent`."""

from orki_agent.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main(prog_name="orki-agent")
