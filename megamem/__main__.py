"""`python -m megamem`: the same as the `megamem` command."""

import sys

from megamem.cli import main

if __name__ == "__main__":
    sys.exit(main())
