"""A ledger of attribute and environment changes that can be taken back exactly."""

import functools
import os
from collections.abc import Callable
from typing import Any

_ABSENT: Any = object()


class Ledger:
    """Sets attributes and environment variables, and puts back what was there, last change first.

    An attribute that its owner merely inherited (`torch.Tensor.cuda` lives on a base class) is *deleted* again on undo,
    so that afterwards `vars(owner)` is what it was, object by object.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Bind `owner.name` to `value` until `undo`."""
        old = vars(owner).get(name, _ABSENT)
        setattr(owner, name, value)
        if old is _ABSENT:
            self._undo.append(lambda: delattr(owner, name))
        else:
            self._undo.append(lambda: setattr(owner, name, old))

    def set_existing(self, owner: Any, name: str, value: Any) -> None:
        """Like `set`, but only where this release of the library has the name at all."""
        if hasattr(owner, name):
            self.set(owner, name, value)

    def default_env(self, name: str, value: str) -> None:
        """Set an environment variable unless the user has set it."""
        if name not in os.environ:
            os.environ[name] = value
            self._undo.append(functools.partial(os.environ.pop, name, None))

    def call_on_undo(self, function: Callable[[], None]) -> None:
        """Have `function` called when its turn comes in the undoing."""
        self._undo.append(function)

    def undo(self) -> None:
        """Take every change back, even if one of them fails; the first failure is raised at the end."""
        failure: Exception | None = None
        while self._undo:
            try:
                self._undo.pop()()
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure
