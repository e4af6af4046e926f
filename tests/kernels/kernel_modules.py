"""Where the kernels are: found, not listed, so that none is forgotten."""

from importlib import import_module
from pkgutil import walk_packages
from types import ModuleType

from triton.runtime import JITFunction

import megamem.kernels


def kernel_modules() -> list[ModuleType]:
    """Every module of megamem that has Triton kernels or device functions."""
    names = [info.name for info in walk_packages(megamem.kernels.__path__, "megamem.kernels.")]
    modules = [import_module(name) for name in names]
    return [module for module in modules if any(isinstance(value, JITFunction) for value in vars(module).values())]
