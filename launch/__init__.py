"""The commands, and what only they use. Importing it names a package of the user's that hides one of ours."""

import importlib.util
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


def _refuse_what_hides_ours() -> None:
    """With `python -m` the working directory and PYTHONPATH come before an installed clone: a `model.py` or `data/` there would be
    imported in place of ours. Commands that are started by their path put their own clone first."""
    for name in ("data", "model"):
        spec = importlib.util.find_spec(name)
        found = spec and (spec.origin or next(iter(spec.submodule_search_locations or ()), None))
        if found and not Path(found).resolve().is_relative_to(_ROOT):
            sys.stderr.write(f"error: {found} hides this system's package {name!r}; rename it, or take its folder off PYTHONPATH\n")
            sys.exit(2)


_refuse_what_hides_ours()
