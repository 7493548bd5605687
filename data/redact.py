"""Secrets stay out of what is said and written down: error sentences, logs, `config.json`, W&B, model cards."""

from __future__ import annotations

import re
from typing import Any

#: The end of a name in snake case, see `is_secret`.
SECRET = re.compile(
    r"(?i)((^|_)key|(api|access)key|secret|passw(or)?d|passphrase|credentials?|authorization"
    r"|(^|(hf|hub|api|auth|access|wandb)_?)token)$"
)
#: Where a word begins in camel case.
HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
#: The user and password of a URL. `pathlib` makes one slash of two, which then only a known scheme tells from a path.
URL_USER = re.compile(r"(://|\b(?:https?|ftps?|ssh|git|s3|gs|hf):/)[^/\s'\"]+@")
#: `?token=...` and its like; a query's names are fewer than JSON's, so whatever speaks of a secret counts.
URL_SECRET = re.compile(r"(?i)([?&][^=&#\s]*(?:token|key|secret|passw|credential|sig)[^=&#\s]*=)[^&#\s'\"]+")
#: `--api_key VALUE`, `--hf-token=VALUE`, `WANDB_API_KEY=VALUE` and `"api_key": "VALUE"` in a line of text. A value in quotes ends
#: with them; after a space another flag is none, and what ends before a colon may be a path (`in/secret: no such folder`). A flag
#: begins a word: a line of hyphens is not tried from each of them.
NAMED = re.compile(
    r"(?i)((?:(?<![\w-])--[\w-]*?(?:(?<![a-z])key|(?:api|access|secret|private)key|secret|passw(?:or)?d|passphrase|credentials?"
    r"|(?:(?<=--)|(?:hf|hub|api|auth|access|wandb)[_-]?)token)(?:=| (?!-))"
    r"|\b\w*(?:(?:api|access|secret|private)[_-]?key|secret|passw(?:or)?d|passphrase|authorization"
    r"|(?:hf|hub|api|auth|access|wandb)[_-]?token)(?:=|['\"][ \t]*:[ \t]*)"
    r"|(?<![\w/.-])(?:[\w-]*(?:(?:api|access|secret|private)[_-]?key|authorization|(?:hf|hub|api|auth|access|wandb)[_-]?token)"
    r"|passw(?:or)?d)[ \t]*:[ \t]*)['\"]?)"
    r"(?:(?<=')[^'\n]+|(?<=\")[^\"\n]+|(?:(?:bearer|basic) +)?[^\s'\";,&#]+)"
)
#: What gives itself away wherever it stands: tokens of the hub, GitHub, GitLab, OpenAI's kind, Slack, and AWS's key names.
TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}|xox[abprs]-[\w-]{10,}"
    r"|A[KS]IA[0-9A-Z]{16})"
)
HIDDEN = "[redacted]"


def is_secret(name: str) -> bool:
    """Whether a name speaks of a secret, in snake case, camel case or with hyphens."""
    return bool(SECRET.search(HUMP.sub("_", name).replace("-", "_")))


def redact(value: Any, name: str = "") -> Any:
    """`value` without secrets: what stands under a name that speaks of one, deeper down too, and what `redact_text` finds.

    Null, a switch and a container of numbers alone, such as ids, are none.
    """
    if isinstance(value, (dict, list, tuple)) and not _has_text(value):
        name = ""
    if isinstance(value, dict):
        return {k: redact(v, str(k) if is_secret(str(k)) else name) for k, v in value.items()}
    if isinstance(value, (list, tuple)):  # a command line's values follow their names
        names = ["", *(v[2:] if isinstance(v, str) and v.startswith("--") else "" for v in value)]
        return [redact(v, before if is_secret(before) else name) for before, v in zip(names, value, strict=False)]
    if is_secret(name) and value not in (None, "") and not isinstance(value, bool):
        return HIDDEN
    return redact_text(value) if isinstance(value, str) else value


def _has_text(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_text, value.values()))
    return any(map(_has_text, value)) if isinstance(value, (list, tuple)) else isinstance(value, str)


def redact_text(text: str) -> str:
    """A line without passwords and tokens inside URLs, values of flags and variables named like a secret, known tokens."""
    text = URL_SECRET.sub(rf"\g<1>{HIDDEN}", URL_USER.sub(rf"\g<1>{HIDDEN}@", text))
    return TOKEN.sub(HIDDEN, NAMED.sub(rf"\g<1>{HIDDEN}", text))
