"""A recomputed block sends its tokens where its first forward sent them."""

import threading

import pytest
import torch

from model.replay import RouterReplay
from tests.model.small_moe import config, initialised


def test_replay_replays_and_does_not_count_again() -> None:
    moe = initialised(config())
    x = torch.randn(1, 50, 32, dtype=torch.float64)
    replay = RouterReplay()
    with replay:
        first = moe(x)
    counted = moe.gate.load_E.clone()
    # Between forward and recomputation everything that decides the choice changes.
    moe.gate.e_score_correction_bias.neg_()
    with replay:
        again = moe(x)
    assert torch.equal(first, again)
    assert torch.equal(moe.gate.load_E, counted)
    with RouterReplay():
        fresh = moe(x)
    assert not torch.equal(first, fresh)
    assert RouterReplay.current() is None


def test_a_replay_is_one_threads_own() -> None:
    """Autograd recomputes CUDA blocks on its own threads."""
    seen: list[RouterReplay | None] = []
    with RouterReplay():
        other = threading.Thread(target=lambda: seen.append(RouterReplay.current()))
        other.start()
        other.join()
    assert seen == [None]


def test_a_replay_within_a_replay_gives_way_again() -> None:
    outer, inner = RouterReplay(), RouterReplay()
    with outer:
        with inner:
            assert RouterReplay.current() is inner
        assert RouterReplay.current() is outer


def test_replay_is_ready_again_after_an_early_stop() -> None:
    """torch's checkpoint leaves the recomputation by an exception as soon as it has what it needs."""
    moe = initialised(config())
    x = torch.randn(1, 10, 32, dtype=torch.float64)
    replay = RouterReplay()
    with replay:
        first = moe(x)
    with pytest.raises(RuntimeError, match="stop"), replay:
        moe(x)
        raise RuntimeError("stop")
    assert RouterReplay.current() is None
    with replay:
        assert torch.equal(moe(x), first)


def test_a_replay_keeps_several_routers_in_order() -> None:
    layers = [initialised(config()) for _ in range(2)]
    x = torch.randn(1, 20, 32, dtype=torch.float64)
    replay = RouterReplay()
    for attempt in range(2):
        with replay:
            outs = [layer(x) for layer in layers]
        if attempt == 0:
            firsts = outs
    assert len(replay.choices) == 2
    assert all(torch.equal(a, b) for a, b in zip(firsts, outs, strict=True))
