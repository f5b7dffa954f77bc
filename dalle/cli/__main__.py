"""`python -m dalle.cli` is `dalle` by another name."""

import sys

from dalle.cli.main import main

sys.exit(main())
