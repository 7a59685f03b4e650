"""``python -m dcryo`` is the command line."""

import sys

from dcryo.cli import main

sys.exit(main())
