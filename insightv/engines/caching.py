"""What is made once and remembered while there is room, by several threads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")


class Cache(Generic[T]):
    """Things by name, each made once; the least recently used go first."""

    def __init__(self, make: Callable[[str], T], size: Callable[[T], int], limit: int):
        """Remembers what ``make`` gives, up to ``limit`` in all by ``size``."""
        self._make, self._size_of = make, size
        self._limit, self._size = limit, 0
        self._entries: OrderedDict[str, Future[T]] = OrderedDict()
        self._lock = Lock()

    def get(self, name: str) -> T:
        """Makes a thing, waits for a thread that already does, or remembers.

        Raises:
            Exception: Whatever making it raises; nothing is remembered then.
        """
        with self._lock:
            future = self._entries.get(name)
            if future is not None:
                self._entries.move_to_end(name)
            else:
                ours = self._entries[name] = Future()
        if future is not None:
            return future.result()
        try:
            ours.set_result(self._make(name))
        except BaseException as error:
            with self._lock:
                self._entries.pop(name, None)
            ours.set_exception(error)
            raise
        with self._lock:
            self._size += self._size_of(ours.result())
            for known, entry in list(self._entries.items()):
                if self._size <= self._limit:
                    break
                if entry.done():
                    del self._entries[known]
                    self._size -= self._size_of(entry.result())
        return ours.result()
