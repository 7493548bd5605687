"""A key-value cache whose memory follows what is used, without copying all of it for each new token.

Shapes: B batch, M key-value heads, S new positions, L positions held, D head dim.
"""

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

FIRST_ROOM = 64  # positions


class GrowingLayer(DynamicLayer):
    """One layer's keys and values at the front of storage that grows by half; transformers' own concatenates at every step."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storage: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Adds `[B, M, S, D]` and returns all that is held, `[B, M, L, D]`, as views of the storage."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        needed = held + key_states.shape[-2]
        if self.storage is None or needed > self.storage[0].shape[-2] or not self._is_front(held):
            self.storage = tuple(
                self._grown(old, new, held, needed) for old, new in ((self.keys, key_states), (self.values, value_states))
            )  # type: ignore[assignment]
        assert self.storage is not None
        for storage, new in zip(self.storage, (key_states, value_states), strict=True):
            storage[..., held:needed, :] = new
        self.keys, self.values = (storage[..., :needed, :] for storage in self.storage)
        return self.keys, self.values

    def _is_front(self, held: int) -> bool:
        """Whether keys and values still lie in the storage: reordering beams or selecting rows makes new tensors of them.

        None that are held lie nowhere, and the rows to come may be fewer than the storage has.
        """
        assert self.storage is not None and self.keys is not None and self.values is not None
        pairs = zip((self.keys, self.values), self.storage, strict=True)
        return held > 0 and all(x.data_ptr() == s.data_ptr() and x.stride() == s.stride() for x, s in pairs)

    @staticmethod
    def _grown(old: Tensor | None, new: Tensor, held: int, needed: int) -> Tensor:
        room = max(FIRST_ROOM, needed + needed // 2)
        storage = new.new_empty((*new.shape[:-2], room, new.shape[-1]))
        if held and old is not None:
            storage[..., :held, :] = old
        return storage

    def reset(self) -> None:
        self.storage = None
        super().reset()


class GrowingCache(Cache):
    """For `generate(past_key_values=GrowingCache())`; it is written in place, so no gradients."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=GrowingLayer)
