"""Runs `orki-checks` without its console script."""

import sys

from orki_codegen.checks import main

sys.exit(main())
