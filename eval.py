"""Score a checkpoint: python eval.py --checkpoint runs/digits/best.pt (--help lists all options)."""

import sys

from gac.cli import eval_main

if __name__ == "__main__":
    sys.exit(eval_main())
