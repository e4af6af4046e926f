"""The life of one forked rank: join the group, then answer calls until the pool hangs up."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import gc
import importlib
import importlib.util
import os
import pickle
import random
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import IO, Any


@dataclass(frozen=True, kw_only=True)
class Call:
    """A function by name, with what it takes to find it again in a process that has not imported its module."""

    module: str
    qualname: str
    file: str | None
    path: tuple[str, ...]
    args: bytes

    @classmethod
    def of(cls, function: Callable[..., Any], args: tuple[Any, ...]) -> Call:
        """Raises `TypeError` for a lambda or a nested function: another process cannot look those up."""
        module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
        if module is None or qualname is None or _look_up(sys.modules.get(module), qualname) is not function:
            raise TypeError(f"{function!r} must be a module-level function: ranks find it by its name")
        file = getattr(sys.modules[module], "__file__", None)
        return cls(module=module, qualname=qualname, file=file, path=tuple(sys.path), args=pickle.dumps(args))

    def run(self) -> Any:
        """Call it, here."""
        sys.path[:] = self.path
        importlib.invalidate_caches()
        function = _look_up(self._import(), self.qualname)
        return function(*pickle.loads(self.args))

    def _import(self) -> Any:
        module = sys.modules.get(self.module)
        if module is not None:
            return module
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(self.module)
        # A test file that pytest imported by path (import mode "importlib").
        assert self.file is not None
        spec = importlib.util.spec_from_file_location(self.module, self.file)
        assert spec is not None and spec.loader is not None
        module = sys.modules[self.module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def _look_up(module: Any, qualname: str) -> Any:
    try:
        return functools.reduce(getattr, qualname.split("."), module)
    except AttributeError:
        return None


def die_with_parent() -> None:
    """Linux: be killed when the process that forked us dies, however it dies. Elsewhere: nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def serve_rank(
    rank: int,
    nranks: int,
    listener: socket.socket,
    pipe: Connection[Any, Any],
    to_close: list[Connection[Any, Any]],
    output: IO[bytes],
) -> None:
    """Main function of a forked rank."""
    die_with_parent()
    os.setpgid(0, 0)  # what the rank starts, Megatron's writers of checkpoints for one, ends with it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and decides
    faulthandler.register(signal.SIGUSR1, file=output, all_threads=True)
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - pytest may have replaced them
    for connection in to_close:
        connection.close()
    # Third parties' warnings are not this test's business; ours are errors, as in the pytest process. Torch
    # attributes its own warnings to the rig's device mode, the Python frame nearest to it.
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", module=r"megamem\.(?!testing)")
    try:
        _join_group(rank, nranks, listener)
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        return
    pipe.send((True, b""))
    while True:
        try:
            call: Call = pipe.recv()
        except EOFError:
            os._exit(0)  # no clean-up: gloo's could wait for ranks that have gone already
        try:
            answer: tuple[bool, Any] = True, pickle.dumps(call.run())
            reset_megatron()
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(answer)


def _join_group(rank: int, nranks: int, listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(nranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(nranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a sandbox may not resolve its own host name

    import torch
    import torch.distributed as dist

    from megamem.testing.cpu import cpu_rig

    torch.set_num_threads(1)
    cpu_rig().start()
    serves = rank == 0
    fd = listener.detach() if serves else None
    if not serves:
        listener.close()
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, nranks, is_master=serves, wait_for_workers=False, master_listen_fd=fd
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=nranks)
    reset_megatron()
    gc.freeze()  # torch's and Megatron's modules: the collections between cases need not look at them again


def reset_megatron() -> None:
    """Forget everything that Megatron and torch keep between two cases, the process group excepted."""
    import torch
    import torch.distributed as dist

    core = sys.modules.get("megatron.core")
    if core is not None:
        _reset_megatron_globals()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    # gloo's communicators end with their last reference, and each of their threads wakes a hundred times a second: some
    # hundred of them, kept by cycles of modules and process groups, take the processor from the cases that follow.
    gc.collect()
    _let_go_of_models()
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    torch.set_grad_enabled(True)
    torch.manual_seed(0)
    random.seed(0)


def _let_go_of_models() -> None:
    """Models under Megatron's DDP: it keeps autograd nodes whose hooks refer to it, a cycle that Python cannot see."""
    wrapper = sys.modules.get("megatron.core.distributed.distributed_data_parallel")
    if wrapper is None:
        return
    left = [found for found in gc.get_objects() if type(found) is wrapper.DistributedDataParallel]
    for found in left:
        found.grad_accs = []
    if left:
        del found, left
        gc.collect()


def _reset_megatron_globals() -> None:
    from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine, tensor_parallel
    from megatron.core.tensor_parallel import random as megatron_random

    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.unset_num_microbatches_calculator()
    rerun_state_machine.destroy_rerun_state_machine()
    tensor_parallel.get_cuda_rng_tracker().reset()
    vars(megatron_random)["_CUDA_RNG_STATE_TRACKER_INITIALIZED"] = False
    moe = sys.modules.get("megatron.core.transformer.moe.moe_utils")
    if moe is not None and hasattr(moe, "_MOE_LAYER_WISE_LOGGING_TRACKER"):
        moe._MOE_LAYER_WISE_LOGGING_TRACKER.clear()
    # lru_cache on methods: it keeps the modules, which keep their process groups.
    for name in ("rotary_pos_embedding", "yarn_rotary_pos_embedding"):
        embeddings = sys.modules.get(f"megatron.core.models.common.embeddings.{name}")
        owners = [owner for owner in vars(embeddings).values() if isinstance(owner, type)] if embeddings else []
        for method in (found for owner in owners for found in vars(owner).values()):
            if hasattr(method, "cache_clear"):
                method.cache_clear()
