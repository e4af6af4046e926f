"""Triton's interpreter, so that kernels run on the CPU: for one test, without an environment variable."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of the kernels, with each of them run by the interpreter, which rounds as the GPU does."""
    pytest.importorskip("torch", reason="pip install 'megamem[train]'")
    pytest.importorskip("triton", reason="pip install 'megamem[dev]'")
    import triton.experimental.gluon  # noqa: F401 - the first launch would, and it copies what is replaced below
    import triton.language as tl
    from triton.runtime import JITFunction, interpreter

    from megamem.kernels.linear_cross_entropy import triton as kernels

    monkeypatch.setattr(interpreter, "_convert_float", _rounding_converter(interpreter._convert_float))
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", _call_and_restore)
    # What TRITON_INTERPRET=1 does, but only if it is set before triton is imported, and then for the whole process.
    for module in (kernels, tl, tl.standard):
        for name, function in list(vars(module).items()):
            if isinstance(function, JITFunction):
                monkeypatch.setattr(module, name, interpreter.InterpretedFunction(function.fn))
    yield kernels


def _call_and_restore(function: Any, *args: Any, **kwargs: Any) -> Any:
    """A device function's call; triton 3.9 leaves `triton.language` patched after it, and compiles nothing any more."""
    from triton.runtime import interpreter

    scope = interpreter._patch_lang(function.fn)
    try:
        return function.rewrite()(*args, **kwargs)
    finally:
        scope.restore()


def _rounding_converter(original: Any) -> Any:
    """Triton 3.9's interpreter truncates on the way to bf16 (triton issue 8322); the GPU rounds to nearest even."""
    import numpy as np
    import torch
    import triton.language as tl

    dtypes = {tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16}
    bits = {2: (np.int16, torch.int16, np.uint16), 4: (np.int32, torch.int32, np.uint32)}

    def convert(values: Any, source: Any, target: Any, *arguments: Any) -> Any:
        if source not in dtypes or target not in dtypes:
            return original(values, source, target, *arguments)
        signed = np.ascontiguousarray(values).reshape(-1).view(bits[source.primitive_bitwidth // 8][0]).copy()
        converted = torch.from_numpy(signed).view(dtypes[source]).to(dtypes[target])
        _, torch_bits, numpy_bits = bits[target.primitive_bitwidth // 8]
        return converted.view(torch_bits).numpy().view(numpy_bits).reshape(np.shape(values))

    return convert
