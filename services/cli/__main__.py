"""Runs `python -m specprefill.cli`."""

import sys

from .main import main

sys.exit(main())
