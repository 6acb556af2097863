"""python -m benchmarks.kernels (--help lists all options)."""

import sys

from benchmarks.kernels.command import main

if __name__ == "__main__":
    sys.exit(main())
