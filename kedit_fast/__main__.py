"""``python -m kedit_fast``: the command line, where the script ``kedit-fast`` is not on the path."""

import sys

from .cli import main

sys.exit(main())
