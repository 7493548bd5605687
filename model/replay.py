"""Router replay: a recomputed block sends its tokens where its first forward sent them."""

import threading
from types import TracebackType

from torch import Tensor


class RouterReplay:
    """Remembers which experts a block's routers chose, so that recomputing the block repeats them.

    Wrap a block's forward in one replay: the first time it is entered the choices are recorded, every later time they
    are replayed in order and not counted as load. Without this a token near a tie may change its expert between
    forward and recomputation, which corrupts gradients and, under expert parallelism, mismatches the all-to-all.
    """

    _current = threading.local()  # autograd recomputes CUDA blocks on its own threads

    def __init__(self) -> None:
        self.choices: list[Tensor] = []
        self.replaying = False
        self._recorded = False
        self._next = 0
        self._outer: RouterReplay | None = None

    @classmethod
    def current(cls) -> "RouterReplay | None":
        return getattr(cls._current, "replay", None)

    def __enter__(self) -> "RouterReplay":
        self._outer, self._current.replay = self.current(), self
        self.replaying, self._next = self._recorded, 0
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._current.replay, self._outer = self._outer, None
        self._recorded = True

    def next_choice(self) -> Tensor:
        self._next += 1
        return self.choices[self._next - 1]
