"""Importing large libraries, without what they import and nobody uses."""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


@contextmanager
def collector_paused() -> Iterator[None]:
    """Import inside of this: an import makes a million objects that stay, and the collector would visit them often."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Deferred(ModuleType):
    """Gives the attributes of a module, which it imports for the first of them; of `functions`, once one is called."""

    def __init__(self, spec: Any, functions: tuple[str, ...]) -> None:
        super().__init__(spec.name)
        self.__spec__ = spec  # `find_spec` reads it, to see whether it is installed
        self.__file__ = spec.origin  # `inspect` reads it of every module
        self.__path__ = spec.submodule_search_locations  # `from ... import` reads it
        vars(self).update({function: self._deferred_function(function) for function in functions})

    def __getattr__(self, attribute: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), attribute)

    def _deferred_function(self, function: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.__getattr__(function)(*args, **kwargs)


@contextmanager
def deferred(name: str, *functions: str) -> Iterator[None]:
    """What imports this module inside of the context gets a `_Deferred`; afterwards it is what it always was."""
    spec = None if name in sys.modules else find_spec(name)
    if spec is None:
        yield
        return
    stand_in = _Deferred(spec, functions)
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]
