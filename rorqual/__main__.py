"""`python -m rorqual` is the `rorqual` command."""

import sys

from rorqual.cli import main

sys.exit(main())
