"""``python -m kedit_fast``: the command line, where the script ``kedit-fast`` is not on the path."""

import sys

from kedit_fast.commands.cli import main

sys.exit(main())
