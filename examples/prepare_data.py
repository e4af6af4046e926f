"""Make a corpus from the sources of Python's standard library, and print the prefix for `--data-path`.

    python examples/prepare_data.py --limit-mib 8
    python examples/prepare_data.py --text ~/notes

Byte-level tokens, in the format of Megatron's `IndexedDataset`. What is there already is not made again.
"""

from __future__ import annotations

import argparse
import sysconfig
import warnings
from pathlib import Path

from pretrain.corpus import build_corpus


def main() -> None:
    """Parse the flags, build the corpus, print its prefix."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="default: Python's standard library")
    parser.add_argument("--output", type=Path, default=Path(".cache/data"), metavar="FOLDER")
    parser.add_argument("--limit-mib", type=float, default=16, help="stop after so much text (default: %(default)s)")
    args = parser.parse_args()
    folder = args.text or Path(sysconfig.get_path("stdlib"))
    if not folder.is_dir():
        parser.error(f"--text {folder}: no such folder")
    warnings.simplefilter("ignore")  # Megatron's import reports every optional package that is absent
    print(build_corpus(folder, args.output, limit=int(args.limit_mib * 2**20)))


if __name__ == "__main__":
    main()
