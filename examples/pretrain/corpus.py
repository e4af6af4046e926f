"""Any folder of text as a Megatron indexed dataset of bytes: token 0..255 is the byte, 256 ends a document.

The dataset's name holds a digest of the files (path, size, time of change), so a changed folder makes a new one and
an unchanged folder is read once. Files are ordered by a digest of their path: training and validation documents are
then drawn alike, and the order is the same on every machine.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

END_OF_DOCUMENT = 256
_LARGEST_FILE = 4 << 20

Progress = Callable[[str], None]


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def build_corpus(folder: Path, cache: Path, *, limit: int | None = None, tell: Progress = _tell) -> str:
    """Tokenise the text under `folder` (at most `limit` bytes) unless `cache` has it; the dataset's prefix."""
    files = text_files(folder, limit)
    if not files:
        raise SystemExit(f"pretrain_gpt.py: error: no text files under {folder}")
    prefix = cache / f"{folder.resolve().name}-{_digest(folder, files)}"
    if Path(f"{prefix}.idx").is_file():
        return str(prefix)
    cache.mkdir(parents=True, exist_ok=True)
    documents, tokens = _write(prefix, files, tell)
    tell(f"corpus: {documents:,} documents, {tokens:,} byte tokens in {prefix}.bin")
    return str(prefix)


def text_files(folder: Path, limit: int | None = None) -> list[Path]:
    """The files under `folder` that may be text, in an order that depends on their relative paths only."""
    found = []
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        hidden = any(part.startswith((".", "__pycache__", "site-packages")) for part in relative.parts)
        if not hidden and path.is_file() and 0 < path.stat().st_size <= _LARGEST_FILE:
            found.append((hashlib.sha256(relative.as_posix().encode()).digest(), path))
    chosen, total = [], 0
    for _, path in sorted(found):
        total += path.stat().st_size
        if limit is not None and total > limit and chosen:
            break
        chosen.append(path)
    return chosen


def _digest(folder: Path, files: list[Path]) -> str:
    digest = hashlib.sha256(str(folder.resolve()).encode())
    for path in files:
        stat = path.stat()
        digest.update(f"{path.relative_to(folder)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:12]


def _texts(files: list[Path], tell: Progress) -> Iterator[bytes]:
    """The content of every file that is UTF-8 without NUL bytes."""
    size = sum(path.stat().st_size for path in files)
    done, told = 0, 0
    for path in files:
        content = path.read_bytes()
        done += len(content)
        if done * 5 // size > told:
            told = done * 5 // size
            tell(f"corpus: {done / 2**20:.1f} of {size / 2**20:.1f} MiB read")
        if b"\0" not in content and _is_utf8(content):
            yield content


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _write(prefix: Path, files: list[Path], tell: Progress) -> tuple[int, int]:
    """Write PREFIX.bin and PREFIX.idx; the index comes last and by a rename, so that an interrupted run is repeated."""
    import numpy
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.uint16)
    documents = tokens = 0
    for content in _texts(files, tell):
        ids = numpy.empty(len(content) + 1, dtype=numpy.uint16)
        ids[:-1] = numpy.frombuffer(content, dtype=numpy.uint8)
        ids[-1] = END_OF_DOCUMENT
        builder.add_document(ids, [len(ids)])
        documents += 1
        tokens += len(ids)
    builder.finalize(f"{prefix}.idx.part")
    Path(f"{prefix}.idx.part").rename(f"{prefix}.idx")
    return documents, tokens
