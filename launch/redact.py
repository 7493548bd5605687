"""Secrets stay out of what a run writes down: `config.json`, W&B, the command line in both."""

from __future__ import annotations

import re
from typing import Any

SECRET = re.compile(r"(?i)((^|_)key|secret|passw(or)?d|credentials?|(^|(hf|hub|api|auth|access)_)token)$")
URL_USER = re.compile(r"(?<=://)[^/@\s]+@")
#: `?token=...` and its like; a query's names are fewer than JSON's, so whatever speaks of a secret counts.
URL_SECRET = re.compile(r"(?i)([?&][^=&#\s]*(?:token|key|secret|passw|credential|sig)[^=&#\s]*=)[^&#\s]+")
#: What gives itself away wherever it stands: tokens of the hub, GitHub, GitLab, OpenAI's kind, Slack, and AWS's key names.
TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}|xox[abprs]-[\w-]{10,}"
    r"|AKIA[0-9A-Z]{16})"
)
HIDDEN = "[redacted]"


def redact(value: Any, name: str = "") -> Any:
    """`value` without secrets: strings under a name that speaks of one, users, passwords and tokens inside URLs, known tokens."""
    if isinstance(value, dict):
        return {k: redact(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(v, name) for v in value]
    if isinstance(value, str):
        if SECRET.search(name) and value:
            return HIDDEN
        return TOKEN.sub(HIDDEN, URL_SECRET.sub(rf"\g<1>{HIDDEN}", URL_USER.sub(f"{HIDDEN}@", value)))
    return value
