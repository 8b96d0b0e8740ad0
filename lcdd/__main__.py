"""`python -m lcdd` is `lcdd`."""

import sys

from lcdd.cli import main

if __name__ == "__main__":
    sys.exit(main())
