"""`python -m orki_codegen.checks`, for where no console script is installed."""

from __future__ import annotations

import sys

from orki_codegen.checks.plugin import main

sys.exit(main())
