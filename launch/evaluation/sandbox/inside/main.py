"""Where a confined program begins: put up what walls are still missing, then do what it was started for."""

from __future__ import annotations

from typing import Any


def main(config: dict[str, Any]) -> None:
    """config: `level`, `role` (candidate, judge or probe), `descriptors` of its channel, and what the walls need."""
    if config["level"] == "namespaces":
        from launch.evaluation.sandbox.inside import namespaces

        namespaces.enter(config)
    elif config["level"] == "limits":
        from launch.evaluation.sandbox.inside import warden

        warden.watch(config["leash"])
    from launch.evaluation.sandbox.inside.confine import confine

    confine(config)
    if config["role"] == "probe":
        from launch.evaluation.sandbox.inside import attempts

        attempts.main(config)
        return
    from launch.evaluation.sandbox.inside import candidate, judge
    from launch.evaluation.sandbox.inside.channel import Channel

    (judge if config["role"] == "judge" else candidate).main(Channel(*config["descriptors"]))
