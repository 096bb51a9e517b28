"""`python -m recollect` is the `recollect` command."""

import sys

from recollect.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
