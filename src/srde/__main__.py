"""`python -m srde` is `srde`."""

import sys

from srde.cli import main

sys.exit(main())
