"""`python -m training.cli` is `dalle-train` by another name."""

import sys

from training.cli.start import main

sys.exit(main())
