"""Real Megatron-Core modules on a CPU: `cpu_rig()` maps what they ask of CUDA to the CPU, and undoes itself exactly.

    with cpu_rig():
        torch.distributed.init_process_group("nccl")      # becomes gloo
        model = GPTModel(...).cuda()                      # stays where it is

What is mapped, and why it has to be:

* **devices**: `"cuda"`, `torch.device("cuda", i)` and bare ordinals in `device=` become `cpu` (a `TorchFunctionMode`,
  so also inside Megatron and inside backward; it is per thread: a thread that the program starts itself is not
  covered).
* **`torch.cuda`**: streams and events keep their program order but do nothing, memory counters say 0, the CUDA
  generator *is* the CPU generator. Megatron's RNG tracker therefore forks and restores real state, and dropout masks
  are reproducible.
* **`Tensor.type()`** says `torch.cuda.FloatTensor`: Megatron's optimizers sort parameters by that string.
* **`torch.distributed`**: nccl becomes gloo. What gloo of an older torch lacks is emulated in `gloo.py`.
* **environment**: `TORCHDYNAMO_DISABLE=1` (Megatron's `jit_fuser` is `torch.compile`: minutes of C++ compilation for
  test-size tensors), `CUDA_DEVICE_MAX_CONNECTIONS=1` (Megatron asserts it for sequence parallelism),
  `OMP_NUM_THREADS=1` (ranks share the cores). Values that the user has set are kept.

`torch.cuda.is_available()` answers **False**, so torch itself stays on its CPU paths, and a machine that has a GPU
merely has it hidden. `cpu_rig(claim_cuda=True)` answers True, for hosts that insist (Megatron-Bridge).
`device_count()` is positive in either case, because Megatron-LM sets up its groups and seeds only then.
"""

import contextlib
import logging
import os
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import SimpleNamespace, TracebackType
from typing import Any, Self, cast

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from megamem.testing._undo import Ledger
from megamem.testing.gloo import emulate_missing_collectives

_CPU = torch.device("cpu")
_ENVIRONMENT = {"TORCHDYNAMO_DISABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"}
_TOTAL_MEMORY = 80 * 2**30
_NO_OPS = (
    "synchronize", "empty_cache", "ipc_collect", "init", "manual_seed_all", "seed", "seed_all", "set_rng_state_all",
    "reset_peak_memory_stats", "reset_max_memory_allocated", "reset_max_memory_cached",
    "reset_accumulated_memory_stats", "set_per_process_memory_fraction", "set_sync_debug_mode",
)  # fmt: skip
_ZEROS = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")


def _is_cuda(value: object) -> bool:
    if isinstance(value, str):
        return value == "cuda" or value.startswith("cuda:")
    return isinstance(value, torch.device) and value.type == "cuda"


def _is_ordinal(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class _DeviceMode(TorchFunctionMode):
    """Rewrites device arguments. An int is a device only as `device=` and as the first argument of `to`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:  # naming a device is no use of it
            return func(*args, **kwargs)
        device = kwargs.get("device")
        if _is_cuda(device) or _is_ordinal(device):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if any(_is_cuda(arg) for arg in args):
            args = tuple(_CPU if _is_cuda(arg) else arg for arg in args)
        if func is torch.Tensor.to and len(args) > 1 and _is_ordinal(args[1]):
            args = (args[0], _CPU, *args[2:])
        if func is torch._C._nn._parse_to and args and _is_ordinal(args[0]):  # Module.to
            args = (_CPU, *args[1:])
        return func(*args, **kwargs)


def _keep_mode_in_backward(ledger: Ledger) -> None:
    """`Tensor.backward` is itself a function that the mode handles, and a mode is off while it handles one: put it on
    again.
    """
    real = vars(torch.autograd)["_engine_run_backward"]

    def run(*args: Any, **kwargs: Any) -> Any:
        with _DeviceMode():
            return real(*args, **kwargs)

    ledger.set(torch.autograd, "_engine_run_backward", run)


class Event:
    """`torch.cuda.Event` on a machine where everything has already happened; it does measure time."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self._time = 0.0

    def record(self, stream: Any = None) -> None:
        self._time = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds, as CUDA gives them."""
        return (end._time - self._time) * 1e3


class Stream:
    """`torch.cuda.Stream` on a machine that executes in program order."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self.device = _CPU
        self.cuda_stream = 0
        self.stream_id = id(self)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        return True


class _Device:
    """What the stand-ins remember: the current device ordinal and the current stream."""

    def __init__(self) -> None:
        self.ordinal = int(os.environ.get("LOCAL_RANK", "0"))
        self.default_stream = Stream()
        self.stream = self.default_stream

    def count(self) -> int:
        return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)

    def set_ordinal(self, device: Any) -> None:
        if _is_ordinal(device):
            self.ordinal = device
        elif _is_cuda(device):
            self.ordinal = torch.device(device).index or 0

    def set_stream(self, stream: Any) -> None:
        self.stream = stream

    @contextlib.contextmanager
    def in_stream(self, stream: Any) -> Iterator[None]:
        if stream is None:  # torch.cuda.stream(None) is allowed, and changes nothing
            yield
            return
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before


def _constant(value: Any = None) -> Callable[..., Any]:
    """A new function each time: dynamo's tables refuse one object under two `torch.cuda` names."""
    return lambda *_args, **_kwargs: value


def _refuse_cuda() -> None:
    raise RuntimeError(
        "under cpu_rig a call reached the CUDA runtime: the rig lacks a mapping for it. "
        "See the Python frame above this one, and add the name to megamem/testing/cpu.py."
    )


def _properties() -> SimpleNamespace:
    return SimpleNamespace(
        name="megamem CPU rig", major=9, minor=0, total_memory=_TOTAL_MEMORY, multi_processor_count=132, warp_size=32
    )


def _replace_cuda(ledger: Ledger, claim_cuda: bool) -> None:
    """Stand-ins for the names of `torch.cuda` that Megatron, its trainers and torch's own Python code call."""
    cuda, device = torch.cuda, _Device()

    def put(name: str, value: Any) -> None:
        for module in (cuda, cuda.random, cuda.memory, getattr(cuda, "streams", cuda)):
            if name in vars(module):
                ledger.set(module, name, value)

    for name in _NO_OPS:
        put(name, _constant())
    for name in _ZEROS:
        put(name, _constant(0))
    put("is_available", _constant(claim_cuda))
    put("_lazy_init", _refuse_cuda)
    put("device_count", device.count)
    put("current_device", lambda: device.ordinal)
    put("set_device", device.set_ordinal)
    put("device", lambda _device: contextlib.nullcontext())
    put("Stream", Stream)
    put("Event", Event)
    put("stream", device.in_stream)
    put("set_stream", device.set_stream)
    put("current_stream", lambda *_args, **_kwargs: device.stream)
    put("default_stream", lambda *_args, **_kwargs: device.default_stream)
    put("is_current_stream_capturing", _constant(False))
    put("is_bf16_supported", _constant(True))
    put("get_device_properties", lambda *_args, **_kwargs: _properties())
    put("get_device_capability", _constant((9, 0)))
    put("get_device_name", _constant(_properties().name))
    put("memory_stats", lambda *_args, **_kwargs: defaultdict(int))
    put("mem_get_info", _constant((_TOTAL_MEMORY, _TOTAL_MEMORY)))
    put("get_rng_state", lambda *_args, **_kwargs: torch.get_rng_state())
    put("set_rng_state", lambda state, *_args, **_kwargs: torch.set_rng_state(state))
    put("get_rng_state_all", lambda: [torch.get_rng_state()])
    put("initial_seed", lambda: torch.default_generator.initial_seed())
    put("manual_seed", _seed_cpu)
    put("default_generators", (torch.default_generator,) * max(device.count(), device.ordinal + 1))
    for name, tensor_type in _tensor_types().items():
        put(name, tensor_type)
    for name in ("range_push", "range_pop", "mark"):
        ledger.set_existing(cuda.nvtx, name, _constant())
    accelerator = getattr(torch, "accelerator", None)
    if accelerator is not None:
        ledger.set_existing(accelerator, "current_stream", lambda *_args, **_kwargs: device.stream)
        ledger.set_existing(accelerator, "synchronize", _constant())


def _seed_cpu(seed: int) -> None:
    """Not `torch.manual_seed`, which would seed CUDA in turn and so come back here."""
    torch.default_generator.manual_seed(int(seed))


def _tensor_types() -> dict[str, Any]:
    """`torch.cuda.FloatTensor([..])` builds a CPU tensor; the names stay types, for `isinstance`."""
    kinds = ("Float", "Double", "Half", "BFloat16", "Byte", "Char", "Short", "Int", "Long", "Bool")
    return {f"{kind}Tensor": getattr(torch, f"{kind}Tensor") for kind in kinds}


def _replace_tensor_methods(ledger: Ledger) -> None:
    real_type = cast(Callable[..., Any], torch.Tensor.type)

    def type_naming_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = real_type(self, *args, **kwargs)
        if isinstance(result, str) and not result.startswith("torch.cuda."):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    ledger.set(torch.Tensor, "type", type_naming_cuda)
    ledger.set(torch.Tensor, "cuda", lambda self, *_args, **_kwargs: self)
    ledger.set(torch.Tensor, "pin_memory", lambda self, *_args, **_kwargs: self)
    ledger.set(torch.Tensor, "is_pinned", lambda self, *_args, **_kwargs: True)
    ledger.set(torch.Tensor, "record_stream", lambda self, *_args, **_kwargs: None)
    ledger.set(torch.nn.Module, "cuda", lambda self, *_args, **_kwargs: self)
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        ledger.set_existing(torch.optim.Optimizer, name, lambda _self: None)


def _replace_process_groups(ledger: Ledger) -> None:
    real_init, real_new_group = dist.init_process_group, dist.new_group

    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("device_id", None)
        kwargs.pop("pg_options", None)
        real_init("gloo", *args, **kwargs)

    def new_group(*args: Any, **kwargs: Any) -> Any:
        args = tuple("gloo" if arg == "nccl" else arg for arg in args)
        if "backend" in kwargs:
            kwargs["backend"] = "gloo"
        kwargs.pop("pg_options", None)
        kwargs.pop("device_id", None)
        return real_new_group(*args, **kwargs)

    for module in (dist, dist.distributed_c10d):
        ledger.set(module, "init_process_group", init_process_group)
        ledger.set(module, "new_group", new_group)
    emulate_missing_collectives(ledger)


def _replace_megatron(ledger: Ledger) -> None:
    """The two functions of Megatron that go to the CUDA generator past `torch.cuda`'s public names, and one import it
    forgot.
    """
    if find_spec("megatron") is None or find_spec("megatron.core") is None:
        return
    with warnings.catch_warnings(action="ignore"):  # Megatron says at import what it would rather have
        import megatron.core.tensor_parallel.random as random
        from megatron.core.transformer.moe import moe_utils

    if hasattr(random, "_set_cuda_rng_state"):
        ledger.set(random, "_set_cuda_rng_state", lambda state, *_args, **_kwargs: _set_state(state))
    if hasattr(random, "_get_cuda_rng_state"):
        ledger.set(random, "_get_cuda_rng_state", _get_state)
    # 0.16's router reads this name also where Transformer Engine, from which it comes, is not installed.
    if not hasattr(moe_utils, "te_general_gemm"):
        ledger.set(moe_utils, "te_general_gemm", None)
    # Its tracker reports every draw inside `fork` as a disturbed CPU generator. Here that generator is meant to be
    # drawn from.
    log, quiet = logging.getLogger(random.__name__), _drop_rng_report
    log.addFilter(quiet)
    ledger.call_on_undo(lambda: log.removeFilter(quiet))


def _get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> Any:
    return torch.default_generator.clone_state() if graph_safe else torch.get_rng_state()


def _set_state(state: torch.Tensor | torch.Generator) -> None:
    torch.set_rng_state(state.get_state() if isinstance(state, torch.Generator) else state)


def _drop_rng_report(record: logging.LogRecord) -> bool:
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def _disable_dynamo(ledger: Ledger) -> None:
    """The environment variable works only before dynamo is imported; afterwards its config decides."""

    def set_disabled(disabled: bool) -> None:
        config = sys.modules.get("torch._dynamo.config")
        if config is not None:
            cast(Any, config).disable = disabled

    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return  # the user's own choice, for the whole process
    before = getattr(sys.modules.get("torch._dynamo.config"), "disable", False)
    set_disabled(True)
    ledger.call_on_undo(lambda: set_disabled(before))


class CpuRig:
    """See the module's docstring. Rigs nest; each undoes what it did. The object can be started again after `stop`."""

    def __init__(self, *, claim_cuda: bool = False) -> None:
        self._claim_cuda = claim_cuda
        self._ledger: Ledger | None = None

    def start(self) -> None:
        """Enter the rig; raises `RuntimeError` if this one is on already."""
        if self._ledger is not None:
            raise RuntimeError("this cpu_rig is on already; stop() it first, or make another one")
        ledger = Ledger()
        try:
            _disable_dynamo(ledger)
            for name, value in _ENVIRONMENT.items():
                ledger.default_env(name, value)
            _replace_megatron(ledger)  # first: importing Megatron must see torch as it is
            _replace_cuda(ledger, self._claim_cuda)
            _replace_tensor_methods(ledger)
            _replace_process_groups(ledger)
            _keep_mode_in_backward(ledger)
            mode = _DeviceMode()
            mode.__enter__()  # type: ignore[no-untyped-call]
            ledger.call_on_undo(lambda: mode.__exit__(None, None, None))  # type: ignore[no-untyped-call]
        except BaseException:
            ledger.undo()
            raise
        self._ledger = ledger

    def stop(self) -> None:
        """Leave the rig; every attribute is again the object it was. Does nothing if the rig is off."""
        ledger, self._ledger = self._ledger, None
        if ledger is not None:
            ledger.undo()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def cpu_rig(*, claim_cuda: bool = False) -> CpuRig:
    """A `CpuRig`, to be used in a `with` statement or by `start()` and `stop()`."""
    return CpuRig(claim_cuda=claim_cuda)
