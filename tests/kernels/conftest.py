"""Triton's interpreter, so that kernels run on the CPU: for one test, without an environment variable.

It converts as the GPU does only once its conversion is replaced; `test_interpreter.py` says what is wrong with it.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Triton's module of that name; every kernel of megamem is run by it, and it rounds as the GPU does."""
    pytest.importorskip("torch", reason="pip install 'megamem[train]'")
    pytest.importorskip("triton", reason="pip install 'megamem[dev]'")
    import triton.experimental.gluon  # noqa: F401 - the first launch would, and it copies what is replaced below
    import triton.language as tl
    from kernel_modules import kernel_modules
    from triton.runtime import JITFunction, interpreter

    monkeypatch.setattr(interpreter, "_convert_float", rounding_converter(interpreter._convert_float))
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", _call_and_restore)
    # What TRITON_INTERPRET=1 does, but only if it is set before triton is imported, and then for the whole process.
    for module in (*kernel_modules(), tl, tl.standard):
        for name, function in list(vars(module).items()):
            if isinstance(function, JITFunction):
                monkeypatch.setattr(module, name, interpreter.InterpretedFunction(function.fn))
    yield interpreter


def _call_and_restore(function: Any, *args: Any, **kwargs: Any) -> Any:
    """A device function's call; triton 3.9 leaves `triton.language` patched after it, and compiles nothing any more."""
    from triton.runtime import interpreter

    scope = interpreter._patch_lang(function.fn)
    try:
        return function.rewrite()(*args, **kwargs)
    finally:
        scope.restore()


def rounding_converter(original: Any) -> Any:
    """A conversion between floating-point types that rounds to nearest even and saturates at the end of FP8's range."""
    import numpy as np
    import torch
    import triton.language as tl

    dtypes = {
        tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2,
    }  # fmt: skip
    largest = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
    bits = {
        1: (np.uint8, torch.uint8, np.uint8), 2: (np.int16, torch.int16, np.uint16),
        4: (np.int32, torch.int32, np.uint32),
    }  # fmt: skip

    def convert(values: Any, source: Any, target: Any, *arguments: Any) -> Any:
        if source not in dtypes or target not in dtypes:
            return original(values, source, target, *arguments)
        signed = np.ascontiguousarray(values).reshape(-1).view(bits[source.primitive_bitwidth // 8][0]).copy()
        wide = torch.from_numpy(signed).view(dtypes[source]).float()
        if target in largest:
            wide = torch.where(wide.isnan(), wide, wide.clamp(-largest[target], largest[target]))
        _, torch_bits, numpy_bits = bits[target.primitive_bitwidth // 8]
        return wide.to(dtypes[target]).view(torch_bits).numpy().view(numpy_bits).reshape(np.shape(values))

    return convert
