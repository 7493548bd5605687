"""Bytes that tensors hold, counted by storage: neither the CPU nor the meta device has an allocator's statistics."""

from __future__ import annotations

import weakref

from torch import Tensor


class LiveBytes:
    """`now`: of the storages that were followed and are still there, each once."""

    def __init__(self) -> None:
        self.now = 0
        self._known: set[int] = set()

    def follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
