"""`python -m training` is `dalle-train` by another name."""

import sys

from training.cli.main import main

sys.exit(main())
