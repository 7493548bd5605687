"""Secrets stay out of what a run writes down: `config.json`, W&B, the command line in both."""

from __future__ import annotations

import re
from typing import Any

SECRET = re.compile(r"(?i)((^|_)key|secret|passw(or)?d|credentials?|(^|(hf|hub|api|auth|access)_)token)$")
URL_USER = re.compile(r"(?<=://)[^/@\s]+@")
#: `?token=...` and its like; a query's names are fewer than JSON's, so whatever speaks of a secret counts.
URL_SECRET = re.compile(r"(?i)([?&][^=&#\s]*(?:token|key|secret|passw|credential|sig)[^=&#\s]*=)[^&#\s]+")
HIDDEN = "[redacted]"


def redact(value: Any, name: str = "") -> Any:
    """`value` without secrets: strings under a name that speaks of one, and users, passwords and tokens inside URLs."""
    if isinstance(value, dict):
        return {k: redact(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(v, name) for v in value]
    if isinstance(value, str):
        if SECRET.search(name) and value:
            return HIDDEN
        return URL_SECRET.sub(rf"\g<1>{HIDDEN}", URL_USER.sub(f"{HIDDEN}@", value))
    return value
