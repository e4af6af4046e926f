"""Every Triton kernel compiles for the GPUs it is for, on a machine that has none, and as well as it should.

The interpreter proves the numbers; this proves that no register is spilled, that memory is read and written 16 bytes at
a time, that shared memory suffices, and that no sum depends on the order in which programs run. Only a GPU can tell
speed.

A module's function whose name ends in `_kernel` is launched, and must be in `CASES`; any other must be called by one of
those.
"""

import contextlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="pip install 'megamem[train]'")
pytest.importorskip("triton", reason="pip install 'megamem[dev]'")

import triton
from kernel_modules import kernel_modules
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from megamem.kernels.norm import triton as norm_kernels

SHARED_NBYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # of one block, CUDA programming guide, table 30


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way in which a kernel is launched.

    types:      of its arguments: pointers, and numbers that are not i32
    constants:  its constexpr arguments
    aligned:    integers that are multiples of 16, as pointers are
    widths:     bytes of the widest load and the widest store
    num_warps:  where the module's launches do not all have the same
    """

    kernel: str
    constants: Mapping[str, Any]
    types: Mapping[str, str]
    aligned: tuple[str, ...] = ()
    targets: tuple[int, ...] = (80, 90, 100)
    widths: tuple[int, int] = (16, 16)
    num_warps: int = 0
    id: str = ""

    @property
    def converts(self) -> bool:
        """Whether the hardware is to convert from or to E4M3."""
        codes = self.kernel.endswith("quantise_kernel") or self.constants.get("coded") or self.constants.get("stores")
        return bool(codes) and (self.constants["element"], self.constants["soft"]) == ("e4m3", False)

    def source(self, function: Any) -> Any:
        """What Triton compiles."""
        names = function.arg_names
        kinds = {name: "constexpr" if name in self.constants else self.types.get(name, "i32") for name in names}
        aligned = {*self.aligned, *(name for name, kind in kinds.items() if kind.startswith("*"))}
        return ASTSource(
            function,
            kinds,
            constexprs={(names.index(name),): value for name, value in self.constants.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        )


@dataclass
class Compiled:
    """What came out: PTX, shared memory, and what the assembler says of registers."""

    ptx: str
    shared_nbytes: int
    log: str = field(repr=False)


def loss_cases() -> list[Case]:
    types = {
        "logits": "*bf16", "gradient": "*bf16", "labels": "*i64", "statistics": "*fp32", "coefficients": "*fp32",
        "scale": "fp32", "cap": "fp32",
    }  # fmt: skip
    aligned = ("num_columns",)
    cases = []
    for whole in (False, True):
        shape = {"has_cap": whole, "block": 4096}
        rows = {"total": 3 * whole, "weighted": 4 * whole, "arg_max": 5 * whole}
        more = {"uniform": 3 * whole, "entropy": 4 * whole}
        name = "everything" if whole else "plain"
        cases += [
            Case(kernel="statistics_kernel", constants=shape | rows, types=types, aligned=(*aligned, "stride"),
                 widths=(16, 4), id=name),
            Case(kernel="gradient_kernel", constants=shape | more, types=types,
                 aligned=(*aligned, "logits_stride", "gradient_stride"), id=name),
        ]  # fmt: skip
    return cases


def codec_cases() -> list[Case]:
    types = {"values": "*bf16", "codes": "*u8", "scales": "*fp32"}
    cases = []
    for element, soft, targets in (
        ("e4m3", False, (90, 100)), ("e5m2", False, (90, 100)), ("e4m3", True, (80,)), ("e5m2", True, (80,)),
        ("int8", False, (80, 90)),
    ):  # fmt: skip
        constants = {"group": 128, "padded": 128, "block": 64, "element": element, "soft": soft}
        name = f"{element}{'-soft' * soft}"
        cases += [
            Case(kernel="quantise_kernel", constants=constants | {"power_of_two": soft}, types=types,
                 aligned=("width", "stride"), targets=targets, id=name),
            Case(kernel="dequantise_kernel", constants=constants, types=types, aligned=("width",),
                 targets=targets, id=name),
        ]  # fmt: skip
    return cases


def activation_cases() -> list[Case]:
    types = {
        **dict.fromkeys(("source", "output", "bias", "gradient", "input_gradient"), "*bf16"), "weights": "*fp32",
        "scales": "*fp32", "codes": "*u8", "code_scales": "*fp32", "weights_gradient": "*fp32", "clamp": "fp32",
        "inside": "fp32", "offset": "fp32",
    }  # fmt: skip
    aligned = ("width", "stride")
    cases = []
    for function, whole, coded in (
        ("silu", False, False), ("silu", False, True), ("gelu_tanh", True, False), ("gelu_tanh", True, True),
    ):  # fmt: skip
        for soft in (False, True):
            shape = {
                "coded": coded, "has_bias": whole and not coded, "has_weights": whole, "function": function,
                "halves": 2, "has_clamp": whole, "group": 128, "padded": 128, "block": 32, "element": "e4m3",
                "soft": soft,
            }  # fmt: skip
            kinds = types | ({"source": "*u8"} if coded else {})
            targets = (80,) if soft else (90, 100)
            name = f"{function}{'-everything' * whole}{'-coded' * coded}"
            stores = {"stores": not coded, "power_of_two": False}
            cases += [
                Case(kernel="activation_kernel", constants=shape | stores, types=kinds, aligned=aligned,
                     targets=targets, id=name),
                Case(kernel="activation_backward_kernel", constants=shape, types=kinds, aligned=aligned,
                     targets=targets, id=name),
            ]  # fmt: skip
    plain = {"coded": False, "has_bias": True, "has_weights": False, "halves": 1, "has_clamp": False}
    plain |= {"function": "gelu", "group": 128, "padded": 128, "block": 32, "element": "int8", "soft": False}
    stores = {"stores": True, "power_of_two": True}
    return [
        *cases,
        Case(kernel="activation_kernel", constants=plain | stores, types=types, aligned=aligned, id="gelu"),
        Case(kernel="activation_backward_kernel", constants=plain, types=types, aligned=aligned, id="gelu"),
    ]


def regelu2_cases() -> list[Case]:
    types = {**dict.fromkeys(("source", "output", "bias", "gradient", "input_gradient"), "*bf16"), "bits": "*u8"}
    aligned = ("width", "quarter")
    return [
        *(Case(kernel="regelu2_kernel", constants={"has_bias": True, "function": function, "block": 2048},
               types=types, aligned=(*aligned, "stride"), id=function) for function in ("gelu", "gelu_tanh")),
        Case(kernel="regelu2_backward_kernel", constants={"block": 2048}, types=types, aligned=aligned),
    ]  # fmt: skip


def norm_warps(width: int) -> int:
    return int(norm_kernels._tile(width, 128)["num_warps"])


def norm_cases() -> list[Case]:
    """Of rows of 4096 and of the most elements."""
    types = {
        **dict.fromkeys(("input", "source", "output", "weight", "bias", "gradient", "input_gradient"), "*bf16"),
        **dict.fromkeys(("mean", "rstd", "scales", "weight_parts", "bias_parts"), "*fp32"), "codes": "*u8",
        "eps": "fp32",
    }  # fmt: skip
    cases = []
    for block, coded, targets in (
        (32, False, (90,)),
        (32, True, (80, 90, 100)),
        (64, True, (90,)),
        (128, True, (80, 100)),
    ):
        for target in targets:
            shape = {"centred": coded, "has_bias": coded, "group": 128, "padded": 128, "block": block}
            shape |= {"element": "e4m3", "soft": target == 80}
            kinds = types | ({"source": "*u8"} if coded else {})
            more: dict[str, Any] = {
                "aligned": ("width", "stride"), "targets": (target,), "id": f"{128 * block}{'-coded' * coded}",
                "num_warps": norm_warps(128 * block),
            }  # fmt: skip
            stores = {"stores": coded, "power_of_two": False}
            cases += [
                Case(kernel="norm_kernel", constants=shape | stores, types=types, **more),
                Case(kernel="norm_rebuild_kernel", constants=shape | {"coded": coded}, types=kinds, **more),
                Case(kernel="norm_backward_kernel", constants=shape | {"coded": coded, "sums": block <= 64},
                     types=kinds, **more),
            ]  # fmt: skip
            if block == 128:
                more["num_warps"] = norm_warps(2048)
                narrow = {"block": 16, "coded": coded}
                cases.append(Case(kernel="norm_sums_kernel", constants=shape | narrow, types=kinds, **more))
    return cases


CASES = [*loss_cases(), *codec_cases(), *activation_cases(), *regelu2_cases(), *norm_cases()]


def functions() -> dict[str, tuple[Any, Mapping[str, Any]]]:
    """Every kernel and device function of megamem with the launch options of its module, by name."""
    found = {}
    for module in kernel_modules():
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and value.fn.__module__ == module.__name__:
                assert name not in found, f"two functions are called {name}"
                found[name] = value, module.LAUNCH
    return found


def called_by(function: Any) -> set[str]:
    """The device functions that a function calls, directly or not, and its own name."""
    found = {function.fn.__name__}
    for name in function.fn.__code__.co_names:
        callee = function.fn.__globals__.get(name)
        if isinstance(callee, JITFunction):
            found |= called_by(callee)
    return found


def compile_case(case: Case, capability: int) -> Compiled:
    function, launch = functions()[case.kernel]
    options = launch | ({"num_warps": case.num_warps} if case.num_warps else {})
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(case.source(function), target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    return Compiled(compiled.asm["ptx"], compiled.metadata.shared, log.getvalue())


def widest_access(ptx: str, kind: str) -> int:
    """Bytes of the widest load (`ld`) or store (`st`) of global memory."""
    found = re.findall(rf"{kind}\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)\s", ptx)
    return max(int(count or 1) * int(bits) // 8 for count, bits in found)


def test_no_kernel_is_forgotten() -> None:
    known = functions()
    launched = {name for name in known if name.endswith("_kernel")}
    assert launched == {case.kernel for case in CASES}
    assert set(known) == {name for kernel in launched for name in called_by(known[kernel][0])}


@pytest.mark.parametrize(
    ("case", "capability"),
    [
        pytest.param(case, capability, id=f"{case.kernel}-{case.id}-sm_{capability}")
        for case in CASES
        for capability in case.targets
    ],
)
def test_compiles_without_spills(case: Case, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # compiled now, not last week
    monkeypatch.setattr(triton.knobs.nvidia, "dump_ptxas_log", True)
    compiled = compile_case(case, capability)
    assert ".local" not in compiled.ptx, "an array in local memory"
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill", compiled.log)]
    assert spilled and not any(spilled), compiled.log
    assert compiled.shared_nbytes <= SHARED_NBYTES[capability]
    assert not re.search(r"\b(atom|red)\.", compiled.ptx), "atomics: sums in no fixed order"
    assert tuple(widest_access(compiled.ptx, kind) for kind in ("ld", "st")) == case.widths
    if case.converts:
        assert re.search(r"cvt\.rn(\.satfinite)?\.(e4m3x2\.f32|f16x2\.e4m3x2)", compiled.ptx), (
            "the hardware's conversion"
        )
