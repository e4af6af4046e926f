"""Build the compiled core now: `python -m megamem.native`. Prints the path of the library."""

import sys

from megamem.errors import NativeError
from megamem.native import load
from megamem.native.build import build

if __name__ == "__main__":
    try:
        load()
        print(build())
    except NativeError as fault:
        sys.exit(f"megamem: {fault}")
