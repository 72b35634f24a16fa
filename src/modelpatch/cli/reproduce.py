"""modelpatch reproduce: name the project that holds the papers' tables now."""

from __future__ import annotations

from modelpatch.errors import ModelpatchError


def reproduce() -> None:
    """Moved: the papers' tables are the project `studies/` of the repository."""
    raise ModelpatchError(
        "`modelpatch reproduce` is `modelpatch-studies run` now, a project of its own: clone the repository and "
        "`pip install ./studies`."
    )
