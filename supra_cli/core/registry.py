"""Name → object, filled by adding a file to a folder or an entry point to a package, never by editing a list."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from supra_cli.core.errors import UsageError, near_miss

T = TypeVar("T")


class Registry(Generic[T]):
    """Objects of one kind by name.

    The modules of `package` are imported on first use, each registering what it defines; then the entry points of
    `group` (`name = "package.module:object"`) add other people's. An unknown name is a `UsageError` with the nearest
    known one.
    """

    def __init__(self, kind: str, package: str, group: str):
        self.kind = kind
        self._package = package
        self._group = group
        self._objects: dict[str, T] = {}
        self._complete = False

    def register(self, *names: str) -> Callable[[T], T]:
        """Decorator, or plain call: `registry.register("llama", "mistral")(arch)`."""

        def add(item: T) -> T:
            for name in names:
                if name in self._objects and self._objects[name] is not item:
                    raise ValueError(f"two {self.kind}s are named '{name}'")
                self._objects[name] = item
            return item

        return add

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
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
        for point in entry_points(group=self._group):
            self.register(point.name)(point.load())
