"""Exports a schedule: `python export.py --ckpt_path CKPT --budget 0.5 --output DIR`."""

import sys

from hgc_learn.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
