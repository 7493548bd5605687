"""Secrets stay out of what is said and written down: error sentences, logs, `config.json`, W&B, model cards."""

from __future__ import annotations

import re
from typing import Any

SECRET = re.compile(
    r"(?i)((^|_)key|(api|access)key|secret|passw(or)?d|passphrase|credentials?|(^|(hf|hub|api|auth|access|wandb)_?)token)$"
)
#: The user and password of a URL. `pathlib` makes one slash of two, which then only a known scheme tells from a path.
URL_USER = re.compile(r"(://|\b(?:https?|ftps?|ssh|git|s3|gs|hf):/)[^/\s'\"]+@")
#: `?token=...` and its like; a query's names are fewer than JSON's, so whatever speaks of a secret counts.
URL_SECRET = re.compile(r"(?i)([?&][^=&#\s]*(?:token|key|secret|passw|credential|sig)[^=&#\s]*=)[^&#\s'\"]+")
#: `--api_key VALUE`, `--hf-token=VALUE` and `WANDB_API_KEY=VALUE` in a line of text.
NAMED = re.compile(
    r"(?i)((?:--[\w-]*?(?:(?<![a-z])key|(?:api|access)key|secret|passw(?:or)?d|passphrase|credentials?"
    r"|(?:--|(?:hf|hub|api|auth|access|wandb)[_-]?)token)[= ]"
    r"|\b\w*(?:api_?key|access_?key|secret|password|passphrase|(?:hf|hub|api|auth|access|wandb)_?token)=)['\"]?)(?!-)[^\s'\";,&#]+"
)
#: What gives itself away wherever it stands: tokens of the hub, GitHub, GitLab, OpenAI's kind, Slack, and AWS's key names.
TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}|xox[abprs]-[\w-]{10,}"
    r"|A[KS]IA[0-9A-Z]{16})"
)
HIDDEN = "[redacted]"


def redact(value: Any, name: str = "") -> Any:
    """`value` without secrets: strings under a name that speaks of one, those that `redact_text` finds."""
    if isinstance(value, dict):
        return {k: redact(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):  # a command line's values follow their names
        names = ["", *(v[2:].replace("-", "_") if isinstance(v, str) and v.startswith("--") else "" for v in value)]
        return [redact(v, before if SECRET.search(before) else name) for before, v in zip(names, value, strict=False)]
    if isinstance(value, str):
        return HIDDEN if SECRET.search(name) and value else redact_text(value)
    return value


def redact_text(text: str) -> str:
    """A line without passwords and tokens inside URLs, values of flags and variables named like a secret, known tokens."""
    text = URL_SECRET.sub(rf"\g<1>{HIDDEN}", URL_USER.sub(rf"\g<1>{HIDDEN}@", text))
    return TOKEN.sub(HIDDEN, NAMED.sub(rf"\g<1>{HIDDEN}", text))
