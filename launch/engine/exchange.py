"""Rows to the ranks that hold their experts: the counts first, then the rows, while the host and the device do other work.

`Departure` starts an all-to-all and `Arrival` waits for it; in the backward the gradient departs at `Arrival` and arrives at
`Departure`, so that what lies between the two in the forward is computed under the exchange in both directions.

Shapes: P ranks of an expert group, L experts of a rank, R rows sent, N rows that arrive, H hidden.
"""

from __future__ import annotations

from typing import Any

import deepspeed.comm as dist
import torch
from torch import Tensor


class Exchange:
    """One layer's all-to-all: `sent_PL` rows of mine for each rank's experts. Collective.

    The counts are on their way when it is made; `wait_for_counts` ends with the split sizes on the host. On a GPU that is the
    layer's only wait, and it is over once the device has come to the copy: launch work in between.
    """

    def __init__(self, sent_PL: Tensor, group: Any) -> None:
        self.group = group
        self.sent_PL = sent_PL.contiguous()
        self.received_PL = torch.empty_like(self.sent_PL)
        self.pending: Any = None
        self.landing: Tensor | None = None
        self.sizes: tuple[list[int], list[int]] | None = None
        on_host = self.sent_PL.device.type == "cpu"
        self._counts = dist.all_to_all_single(self.received_PL, self.sent_PL, group=group, async_op=on_host)
        self._copied = None if on_host else self._copy_to_host()

    def _copy_to_host(self) -> tuple[Tensor, Any]:
        totals = torch.stack((self.sent_PL.sum(dim=1), self.received_PL.sum(dim=1)))
        host = torch.empty(totals.shape, dtype=totals.dtype, pin_memory=True)
        host.copy_(totals, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event

    def wait_for_counts(self) -> None:
        if self._copied is None:
            self._counts.wait()
            sent, received = self.sent_PL.sum(dim=1).tolist(), self.received_PL.sum(dim=1).tolist()
        else:
            host, event = self._copied
            event.synchronize()
            sent, received = host.tolist()
        self.sizes = sent, received

    def reversed(self) -> Exchange:
        """The way back, whose sizes are known."""
        assert self.sizes is not None
        sent, received = self.sizes
        return self._beside(Exchange, (received, sent))

    def of_gradients(self) -> Exchange:
        """Of something with a number a row whose value nobody needs: in the forward nothing moves, in the backward its gradient."""
        assert self.sizes is not None
        return self._beside(_GradientExchange, self.sizes)

    def _beside(self, kind: type[Exchange], sizes: tuple[list[int], list[int]]) -> Exchange:
        """One of the same ranks that need not ask for its sizes."""
        made = object.__new__(kind)
        made.group, made.pending, made.landing, made.sizes = self.group, None, None, sizes
        return made

    def start(self, rows_RH: Tensor, *, backward: bool = False) -> Tensor:
        """The buffer in which `rows_RH` of other ranks land; not to be read before `finish`."""
        assert self.sizes is not None
        sent, received = reversed(self.sizes) if backward else self.sizes
        self.landing = rows_RH.new_empty((sum(received), *rows_RH.shape[1:]))
        self.pending = dist.all_to_all_single(
            self.landing,
            rows_RH.contiguous(),
            output_split_sizes=received,
            input_split_sizes=sent,
            group=self.group,
            async_op=True,
        )
        return self.landing

    def finish(self) -> Tensor:
        """What has landed."""
        landed, self.landing = self.landing, None
        assert landed is not None
        pending, self.pending = self.pending, None  # it holds the rows that were sent, which would stay until the backward
        if pending is not None:
            pending.wait()
        return landed


class _GradientExchange(Exchange):
    def start(self, rows_RH: Tensor, *, backward: bool = False) -> Tensor:
        if backward:
            return super().start(rows_RH, backward=True)
        assert self.sizes is not None
        self.landing = rows_RH.new_empty(1).expand(sum(self.sizes[1]))
        return self.landing


class Departure(torch.autograd.Function):
    """Starts the rows' exchange; backward waits for the gradient's."""

    @staticmethod
    def forward(ctx: Any, rows_RH: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.start(rows_RH)

    @staticmethod
    def backward(ctx: Any, _dlanding_NH: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.finish(), None


class Arrival(torch.autograd.Function):
    """Waits for the rows' exchange; backward starts the gradient's."""

    @staticmethod
    def forward(ctx: Any, landing_NH: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.finish()
        return landing_NH

    @staticmethod
    def backward(ctx: Any, dout_NH: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.start(dout_NH, backward=True)
        return dout_NH, None  # autograd wants N rows here; `Departure` takes the R that land
