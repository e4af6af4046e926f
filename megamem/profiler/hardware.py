"""What this machine's device can do, measured: the numbers of the hardware table (`planner/data/hardware.yaml`).

Every number is the median of several repetitions after some to warm up. Rates are those of the shapes that training
has: products of [tokens, hidden] with [hidden, ffn] and their gradients, causal attention at rising lengths. Where
several processes were started on the machine all of them measure at the same time, so that copies that share an uplink
show it.

Without a GPU the processor is measured in the same way; its "copies to the host" are copies of memory.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megamem.host import host_memory

_WARM_UP = 2
_MIB = 1 << 20

Entry = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The shapes that are measured, on one tensor-parallel rank.

    nbytes:  of a copy, and of a file
    """

    hidden: int
    ffn: int
    heads: int
    head_dim: int
    seq_length: int
    nbytes: int
    repetitions: int = 5


class Probe:
    """Measures one device. `barrier` makes all processes start together; `progress` hears what is next."""

    def __init__(
        self,
        device: torch.device,
        sizes: Sizes,
        *,
        barrier: Callable[[], None] = lambda: None,
        progress: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.device, self.sizes = device, sizes
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._barrier, self._progress = barrier, progress

    def measure(self) -> dict[str, Entry]:
        """Every number that a single machine shows."""
        found: dict[str, Entry] = {}
        found["memory"] = _entry(self._memory())
        for name, measure in (
            ("gemm", self.gemm),
            ("hbm", self.copy_rate),
            ("pin", self.pin_rate),
        ):
            self._progress(name)
            found[name] = _entry(measure())
        for name, backward in (("attention_forward", False), ("attention_backward", True)):
            self._progress(name)
            found[name] = {**{str(s): self.attention(s, backward=backward) for s in self._lengths()}, **_SOURCE}
        self._progress("link")
        found |= {name: _entry(value) for name, value in self.link().items()}
        self._progress("disk")
        found |= {name: _entry(value) for name, value in self.disk().items()}
        found["link_sharers"] = _entry(1)  # whoever shares the uplink copied at the same time
        return found

    def seconds(self, run: Callable[[], object]) -> float:
        """Median time of a call, device included."""
        taken = []
        for repetition in range(_WARM_UP + self.sizes.repetitions):
            self._barrier()
            self._wait()
            start = time.perf_counter()
            run()
            self._wait()
            if repetition >= _WARM_UP:
                taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _memory(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.get_device_properties(self.device).total_memory)
        return host_memory().total_nbytes

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def gemm(self) -> float:
        """FLOP/s of fc1 and fc2 with both gradients of each: six products, one behind the other."""
        tokens, hidden, ffn = self.sizes.seq_length, self.sizes.hidden, self.sizes.ffn
        x, up, down = self._random(tokens, hidden), self._random(hidden, ffn), self._random(ffn, hidden)
        wide = self._random(tokens, ffn)

        def run() -> None:
            torch.mm(x, up)
            torch.mm(wide, down)
            torch.mm(wide, up.t())
            torch.mm(x, down.t())
            torch.mm(x.t(), wide)
            torch.mm(wide.t(), x)

        return 12.0 * tokens * hidden * ffn / self.seconds(run)

    def _lengths(self) -> list[int]:
        """Powers of two up to the sequence length, six at most."""
        lengths = [self.sizes.seq_length >> shift for shift in range(6)]
        return sorted(length for length in lengths if length >= 64) or [self.sizes.seq_length]

    def attention(self, length: int, *, backward: bool) -> float:
        """FLOP/s of causal attention; the lower triangle counts, in the backward pass two and a half times."""
        heads, width = self.sizes.heads, self.sizes.head_dim
        batch = max(1, self.sizes.seq_length // length)
        q, k, v = (self._random(batch, heads, length, width).requires_grad_(backward) for _ in range(3))
        flops = 2.0 * batch * heads * length * length * width
        forward = self.seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
        if not backward:
            return flops / forward
        gradient = self._random(batch, heads, length, width)

        def both() -> None:
            torch.autograd.backward(F.scaled_dot_product_attention(q, k, v, is_causal=True), gradient)
            q.grad = k.grad = v.grad = None

        return 2.5 * flops / max(1e-9, self.seconds(both) - forward)

    def copy_rate(self) -> float:
        """Bytes per second, read and written, of a copy within device memory."""
        source = torch.empty(self.sizes.nbytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2.0 * self.sizes.nbytes / self.seconds(lambda: target.copy_(source))

    def pin_rate(self) -> float:
        """Bytes per second at which host memory is pinned, first touched included."""
        on_gpu = self.device.type == "cuda"

        def run() -> None:
            torch.empty(self.sizes.nbytes, dtype=torch.uint8, pin_memory=on_gpu).fill_(0)

        return self.sizes.nbytes / self.seconds(run)

    def link(self) -> dict[str, float]:
        """Bytes per second to and from pinned host memory: one direction alone, and both at once."""
        nbytes, on_gpu = self.sizes.nbytes, self.device.type == "cuda"
        host = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
        device = [torch.empty(nbytes, dtype=torch.uint8, device=self.device) for _ in range(2)]

        def out() -> None:
            host[0].copy_(device[0], non_blocking=True)

        def back() -> None:
            device[1].copy_(host[1], non_blocking=True)

        found = {"link_out": nbytes / self.seconds(out), "link_in": nbytes / self.seconds(back)}
        if not on_gpu:

            def in_turn() -> None:
                out()
                back()

            both = nbytes / self.seconds(in_turn)
            return {**found, "link_out_both": both, "link_in_both": both}
        taken = self._both(out, back)
        return {**found, "link_out_both": nbytes / taken[0], "link_in_both": nbytes / taken[1]}

    def _both(self, out: Callable[[], None], back: Callable[[], None]) -> tuple[float, float]:
        """Seconds of each direction while the other one is busy the whole time."""
        streams = [torch.cuda.Stream(self.device) for _ in range(2)]  # type: ignore[no-untyped-call]
        taken: list[list[float]] = [[], []]
        for repetition in range(_WARM_UP + self.sizes.repetitions):
            for measured, (mine, other) in enumerate(((out, back), (back, out))):
                events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
                self._barrier()
                self._wait()
                with torch.cuda.stream(streams[1]):
                    for _ in range(4):
                        other()
                with torch.cuda.stream(streams[0]):
                    events[0].record()
                    mine()
                    events[1].record()
                self._wait()
                if repetition >= _WARM_UP:
                    taken[measured].append(events[0].elapsed_time(events[1]) / 1e3)
        return statistics.median(taken[0]), statistics.median(taken[1])

    def disk(self) -> dict[str, float]:
        """Bytes per second of writing a file down to the disk and of reading it back, past the page cache."""
        content = os.urandom(_MIB) * (self.sizes.nbytes // _MIB or 1)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "probe"
            start = time.perf_counter()
            with path.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            written = time.perf_counter() - start
            with path.open("rb") as file:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                start = time.perf_counter()
                while file.read(16 * _MIB):
                    pass
                read = time.perf_counter() - start
        return {"disk_write": len(content) / written, "disk_read": len(content) / read}


def context_bytes(device: torch.device) -> int:
    """Device memory that is gone before any tensor: of the CUDA context and the communicators, once they are there."""
    if device.type != "cuda":
        return 1  # a positive number, as every entry
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free - torch.cuda.memory_reserved(device))


_SOURCE = {"source": "measured"}


def _entry(value: float) -> Entry:
    return {"value": value, **_SOURCE}


def profile_content(
    measured: Mapping[str, Entry], fallback: Mapping[str, Entry], *, device: str, ranks: int, memory: int
) -> dict[str, Any]:
    """The content of a profile: what was measured, and a row of the table for what one machine cannot show.

    memory: bytes of the machine, which `ranks` processes share
    """
    host = _entry(memory // ranks)
    table = {name: {**entry, "source": f"table: {entry['source']}"} for name, entry in fallback.items()}
    return {"device": device, "ranks": ranks, "hardware": {**table, **measured, "host_memory": host}}
