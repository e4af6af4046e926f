"""Doing something to a module right after it has been imported, before its importer sees it.

A script imports its trainer when and how it likes: after it has set environment variables, or never. So nothing is
imported on its behalf; what has to be patched is patched when the script's own import has just run the module.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, final


@final
class AfterImport(MetaPathFinder):
    """Calls each of `actions`, keyed by module, once: now where the module is there already, else when it is imported.

    What an action raises comes out of the import statement. `close()` forgets the actions that are still waiting.
    `owner` is who waits, for those who look for it in `sys.meta_path`.
    """

    def __init__(self, actions: Mapping[str, Callable[[], None]], owner: object = None) -> None:
        self.owner = owner
        self._waiting = {name: action for name, action in actions.items() if name not in sys.modules}
        sys.meta_path.insert(0, self)
        try:
            for name in actions.keys() - self._waiting.keys():
                actions[name]()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Do nothing from now on."""
        self._waiting.clear()
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's own spec, with a loader that calls the action; None for modules that nothing waits for."""
        action = self._waiting.pop(name, None)
        if action is None:
            return None
        spec = importlib.util.find_spec(name)  # by the other finders: nothing waits for the name any more
        if spec is None or spec.loader is None:
            self._waiting[name] = action
            return None
        spec.loader = _Loader(spec.loader, action)
        return spec


class _Loader(Loader):
    """The module's own loader, which it has again when it has run."""

    def __init__(self, loader: Loader, action: Callable[[], None]) -> None:
        self._loader, self._action = loader, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._action()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
