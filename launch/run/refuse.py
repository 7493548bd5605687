"""Ending all ranks with a mistake that is found before they join: with what joining takes, and without the model's imports."""

from __future__ import annotations

from typing import NoReturn

from data.cli import UserError
from launch.ranks.control_group import ControlGroup
from launch.ranks.join import JOIN_SECONDS, joining_within, start


def refuse_together(error: UserError) -> NoReturn:
    """End all ranks with the mistake that this one found before it joined them; rank 0 speaks where all found the same."""

    def give_reason() -> None:
        raise error

    with joining_within(JOIN_SECONDS):
        try:
            start(timeout=JOIN_SECONDS)
            ControlGroup().run_everywhere(give_reason)
        except UserError:
            raise
        except Exception:  # the others are gone: torchrun ends all ranks when the first has ended
            raise error from None
    raise error
