"""``python -m bench.gpu``: as ``python -m bench gpu``."""

import sys

from bench.gpu.visit import main

sys.exit(main())
