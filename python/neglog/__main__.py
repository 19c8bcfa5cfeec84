"""`python -m neglog`."""

import sys

from neglog.cli import main

if __name__ == "__main__":
    sys.exit(main())
