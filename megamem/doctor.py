"""`megamem doctor`: what of megamem works with what is installed here, and how to get what is missing.

Works, and reports, on a machine without torch. The one module outside `integrations` that looks at the patches,
inside its functions, because saying whether they fit the installed versions is its purpose.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from packaging.requirements import Requirement

from megamem import __version__
from megamem.errors import ConfigError, NativeError
from megamem.host import host_memory
from megamem.native.build import find_compiler
from megamem.options import Bytes

_NEEDED = ("torch", "megatron-core")  # without these no capability works
_OPTIONAL = ("transformer-engine", "apex", "triton", "megatron-bridge", "numpy", "psutil", "tensorboard")
_MODULES = {"transformer-engine": "transformer_engine", "megatron-bridge": "megatron.bridge"}
_PURPOSES = {
    "torch": "everything but configuration",
    "megatron-core": "everything but configuration",
    "transformer-engine": "TE layer specs, FP8, context parallelism",
    "apex": "fused gradient accumulation and norms of Megatron's local layer spec",
    "triton": "fused kernels",
    "megatron-bridge": "NeMo recipes",
    "numpy": "data of examples/pretrain_gpt.py",
    "psutil": "examples/pretrain_gpt.py",
    "tensorboard": "logs of examples/pretrain_gpt.py",
}
_BY_HAND = {
    "apex": "build it from source: https://github.com/NVIDIA/apex",
    "triton": "comes with torch for CUDA on Linux",
}

PackageState = Literal["ok", "not installed", "wrong version", "broken"]


@dataclass(frozen=True, kw_only=True)
class Package:
    """One third-party package: what is there, what megamem supports, and what to do about the difference."""

    name: str
    state: PackageState
    needed: bool
    found: str = ""
    supported: str = ""
    purpose: str = ""
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class PatchState:
    """One record of the patch registry, held against what is installed."""

    capability: str
    target: str
    state: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that `megamem doctor` found. `is_green`: every capability has what it needs."""

    megamem: str
    python: str
    packages: tuple[Package, ...]
    patches: tuple[PatchState, ...]
    machine: tuple[tuple[str, str], ...]

    @property
    def is_green(self) -> bool:
        """Whether all needed packages are in range and all patches fit; optional packages may be missing."""
        return not self.faults()

    def faults(self) -> list[str]:
        """What keeps the report from being green, each with its remedy."""
        faults = [f"{p.name}: {p.state}. {p.remedy}" for p in self.packages if _is_fault(p)]
        return faults + [p.detail for p in self.patches if p.state not in ("applicable", "applied")]

    def to_json(self) -> str:
        """The report for a program."""
        content = dataclasses.asdict(self) | {"machine": dict(self.machine), "green": self.is_green}
        return json.dumps(content | {"faults": self.faults()}, indent=2) + "\n"

    def to_text(self) -> str:
        """The report for a person."""
        lines = [f"megamem {self.megamem}, Python {self.python}", "", "Packages"]
        for p in self.packages:
            line = f"  {_sign(p)} {p.name:<20}{p.found or p.state:<16}{p.supported or 'any':<18}"
            lines.append(f"{line}{p.purpose}".rstrip())
            if p.state != "ok":
                lines.append(f"      {'' if p.state == 'not installed' else p.state + ': '}{p.remedy}")
        lines += ["", "Patches"]
        for patch in self.patches:
            sign = "+" if patch.state in ("applicable", "applied") else "x"
            lines.append(f"  {sign} {patch.capability}: {patch.target}: {patch.state}")
        if not self.patches:
            lines.append("  none needed")
        lines += ["", "Machine", *(f"  {name + ':':<30}{text}" for name, text in self.machine), ""]
        if faults := self.faults():
            lines += [f"Not ready: {len(faults)} thing{'s' * (len(faults) > 1)} to mend", *(f"  x {f}" for f in faults)]
        else:
            lines.append("Ready: everything that the capabilities need is here.")
        return "\n".join(lines) + "\n"


def examine() -> Report:
    """Look at the installed packages, the patches and the machine. Imports torch and Megatron-Core where they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron warns of every optional package that it misses; so do we, below
        torch_fault = _torch_fault()
        return Report(
            megamem=__version__,
            python=platform.python_version(),
            packages=tuple(_package(name, torch_fault) for name in (*_NEEDED, *_OPTIONAL)),
            patches=tuple(_patches()),
            machine=tuple(_machine(torch_fault)),
        )


def patches_ledger() -> str:
    """The text of `patches/README.md`."""
    from megamem.patches import RECORDS
    from megamem.patches.registry import ledger

    return ledger(RECORDS)


def _is_fault(package: Package) -> bool:
    """A missing optional package is none; one that is there in an unsupported version is, because it would be used."""
    return package.state != "ok" and (package.needed or package.state != "not installed")


def _sign(package: Package) -> str:
    return "+" if package.state == "ok" else "x" if _is_fault(package) else "-"


def _supported() -> dict[str, tuple[Requirement, str]]:
    """What setup.py says about other packages: the requirement, and the extra that holds it."""
    try:
        texts: Sequence[str] = importlib.metadata.requires("megamem") or ()
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return {}
    supported = {}
    for text in texts:
        need = Requirement(text)
        extra = str(need.marker).partition('extra == "')[2].rstrip('"') if need.marker else ""
        supported[need.name] = (need, extra)
    return supported


def _package(name: str, torch_fault: str) -> Package:
    need, extra = _supported().get(name, (Requirement(name), ""))
    remedy = f'pip install "megamem[{extra}]"' if extra else _BY_HAND.get(name, f"pip install {name}")
    found = _version(name)
    state: PackageState = "ok"
    if not found:
        state = "not installed"
    elif name == "torch" and torch_fault:
        state, remedy = "broken", f"{torch_fault}; reinstall torch"
    elif found != "unknown" and not need.specifier.contains(found, prereleases=True):
        state, remedy = "wrong version", f"found {found}, supported is {need.specifier}; {remedy}"
    return Package(
        name=name,
        state=state,
        needed=name in _NEEDED,
        found=found,
        supported=str(need.specifier),
        purpose=_PURPOSES[name],
        remedy="" if state == "ok" else remedy,
    )


def _version(name: str) -> str:
    """The version of a package, `unknown` for one without metadata, empty for one that is not there."""
    from megamem.patches.registry import installed_version

    try:
        return installed_version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        found = importlib.util.find_spec(_MODULES.get(name, name)) is not None
    except ModuleNotFoundError:
        found = False
    return "unknown" if found else ""


def _torch_fault() -> str:
    """Why torch cannot be imported; empty where it can."""
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as fault:  # OSError: a shared library that torch needs is missing
        return str(fault).splitlines()[0] if str(fault) else repr(fault)
    return ""


def _patches() -> list[PatchState]:
    """Those of Megatron-Core; trainers are not imported here, which takes long and may need a GPU."""
    from megamem.patches import DOORS, GROUPS
    from megamem.patches.registry import inspect_patch

    return [
        PatchState(capability=capability, target=patch.target, state=found.state, detail=found.detail)
        for capability, patches in {**GROUPS, "megamem run": DOORS["scripts"]}.items()
        for patch in patches
        for found in [inspect_patch(patch)]
    ]


def _machine(torch_fault: str) -> list[tuple[str, str]]:
    facts = [("GPU", _gpu(torch_fault))]
    try:
        memory = host_memory()
        facts.append(("host memory", f"{_size(memory.available_nbytes)} available of {_size(memory.total_nbytes)}"))
    except ConfigError as fault:
        facts.append(("host memory", str(fault)))
    facts.append(("locked memory (ulimit -l)", _locked_memory()))
    facts.append(("C++ compiler", _compiler()))
    connections = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
    note = {
        None: "not set; Megatron asks for 1 with tensor or context parallelism on GPUs before Blackwell",
        "1": "1: kernels and copies of all streams are issued through one queue, so copies may start late",
    }.get(connections, str(connections))
    facts.append(("CUDA_DEVICE_MAX_CONNECTIONS", note))
    if _version("transformer-engine"):
        backward = os.environ.get("NVTE_FP8_DPA_BWD", "1")
        kept = "16 bits; unset it to keep them in 8" if backward == "0" else "8 bits"
        facts.append(("NVTE_FP8_DPA_BWD", f"{backward}: FP8 attention keeps q, k and v in {kept}"))
    return facts


def _compiler() -> str:
    try:
        return f"{shlex.join(find_compiler())}; builds the static allocator and the core of megamem solve"
    except NativeError as fault:
        return f"{fault}. Without it there is no static allocator, and megamem solve is slower"


def _gpu(torch_fault: str) -> str:
    if torch_fault:
        return "unknown, torch cannot be imported"
    import torch

    if not torch.cuda.is_available():
        return "none that torch sees; CPU rehearsals work"
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{device.name} ({_size(device.total_memory)})" for device in devices)


def _locked_memory() -> str:
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{_size(limit)}; raise it if pinning memory fails"


def _size(nbytes: int) -> str:
    for unit, shift in (("GiB", 30), ("MiB", 20)):
        if nbytes >= 1 << shift:
            return f"{nbytes / (1 << shift):.1f} {unit}"
    return Bytes().plain(nbytes)
