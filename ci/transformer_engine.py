"""Transformer Engine's published Python sources, for the tests that read and run them.

usage: python ci/transformer_engine.py [VERSION ...]

Downloads the wheels `transformer-engine` (pure Python, about 1 MB each) of these releases, or of all that the tests
look at, with pip, and unpacks them below .cache/transformer_engine. What is there already is left alone.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

VERSIONS = (
    *("2.10.0", "2.11.0", "2.12.0", "2.13.0", "2.14.1", "2.15.0", "2.16.1", "2.17.1", "2.18.0", "2.19.0"),
    "2.20.2",
)
FOLDER = Path(__file__).parent.parent / ".cache" / "transformer_engine"
_TIMEOUT_S = 120


class FetchError(RuntimeError):
    """A wheel could not be downloaded; the message is pip's."""


def sources(version: str) -> Path:
    """The folder with the unpacked wheel of a release. Raises FetchError where it is not there and cannot be got."""
    folder = FOLDER / version
    if folder.is_dir():
        return folder
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as name:
        scratch = Path(name)
        _download(version, scratch)
        (wheel,) = scratch.glob("*.whl")
        unpacked = scratch / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        try:
            unpacked.rename(folder)
        except OSError:  # somebody else was faster
            if not folder.is_dir():
                raise
    return folder


def _download(version: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--retries", "1", "--dest", str(folder), f"transformer-engine=={version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"transformer-engine {version}: pip took longer than {_TIMEOUT_S} s") from error
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise FetchError(f"transformer-engine {version}: {said[-1] if said else done.stderr[-200:]}")


def main(versions: list[str]) -> int:
    """Fetch several at once."""
    status = 0
    with ThreadPoolExecutor(max_workers=4) as pool:
        waiting = [(version, pool.submit(sources, version)) for version in versions or VERSIONS]
        for _, result in waiting:
            try:
                result.result()
            except FetchError as error:
                print(error, file=sys.stderr)
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
