#!/usr/bin/env python
"""A trained model on other images: `accelerate launch scripts/run_transfer.py --model ... --dataset ... --steps N`."""

import sys

from hf_nose.cli import main


if __name__ == "__main__":
    sys.exit(main(["transfer", *sys.argv[1:]]))
