"""Name → object, filled by adding a file to a folder or an entry point to a package, never by editing a list."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from supra_cli.core.errors import UsageError, near_miss

T = TypeVar("T")


class Registry(Generic[T]):
    """Objects of one kind by name.

    The modules of `package` are imported on first use, each registering what it defines; then the entry points of
    `group` (`name = "package.module:object"`) add other people's. An unknown name is a `UsageError` with the nearest
    known one. In an exported model, where `package` is one file among others, those hold all that there is.
    """

    def __init__(self, kind: str, package: str, group: str):
        self.kind = kind
        self._package = package
        self._group = group
        self._objects: dict[str, T] = {}
        self._origins: dict[str, str] = {}
        self._complete = False

    def register(self, *names: str) -> Callable[[T], T]:
        """Decorator, or plain call: `registry.register("llama", "mistral")(arch)`."""
        origin = sys._getframe(1).f_globals["__name__"]

        def add(item: T) -> T:
            for name in names:
                if name in self._objects and self._objects[name] is not item:
                    raise ValueError(f"two {self.kind}s are named '{name}'")
                self._objects[name] = item
                self._origins[name] = origin
            return item

        return add

    def origin(self, name: str) -> str:
        """The module that defines the object of that name."""
        self.get(name)
        return self._origins[name]

    def get(self, name: str) -> T:
        self._discover()
        if name not in self._objects:
            raise UsageError(f"unknown {self.kind} '{name}'{near_miss(name, self._objects)}")
        return self._objects[name]

    def __contains__(self, name: str) -> bool:
        self._discover()
        return name in self._objects

    def __iter__(self) -> Iterator[str]:
        self._discover()
        return iter(sorted(self._objects))

    def _discover(self) -> None:
        if self._complete:
            return
        self._complete = True
        folders = getattr(sys.modules[self._package], "__path__", None)
        if folders is None:
            return
        for module in pkgutil.iter_modules(folders):
            importlib.import_module(f"{self._package}.{module.name}")
        for point in entry_points(group=self._group):
            self.register(point.name)(point.load())
            self._origins[point.name] = point.module
