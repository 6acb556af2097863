"""Train a network: python train.py --config configs/digits.yaml (--help lists all options)."""

import sys

from gac.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
