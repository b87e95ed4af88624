#!/usr/bin/env python
"""From a dense ViT to a compressed checkpoint: `accelerate launch scripts/run_nose.py --recipe digits`."""

import sys

from hf_nose.cli import main


if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
