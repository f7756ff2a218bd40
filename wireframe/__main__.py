"""``python -m wireframe``."""

import sys

from wireframe.cli import main

sys.exit(main())
