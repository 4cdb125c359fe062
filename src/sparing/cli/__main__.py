"""`python -m sparing.cli`: for launchers that start modules, such as `accelerate launch -m`."""

import sys

from sparing.cli import main

sys.exit(main())
