"""``python -m papaours_auth`` is the command ``papaours-auth``."""

import sys

from .cli import main

sys.exit(main())
