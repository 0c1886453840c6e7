"""Whose fault an exception is: the message's, or the database's for the moment."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

from outbox import database
from outbox.database.errors import Meaning, meaning, sqlstate

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAX_ERROR = 1_000
_MAX_DETAIL = 16_000


def is_transient(error: BaseException) -> bool:
    """Say whether a database was away, busy, or had to roll back for another's sake: trying again is all that helps.

    Looks at *error* and at what it was raised `from`.
    """
    return _trouble(error) is not Meaning.OTHER


def is_conflict(error: BaseException) -> bool:
    """Say whether another transaction was in the way: that is no reason for others to wait. Looks as `is_transient` does."""
    return _trouble(error) in (Meaning.CONFLICT, Meaning.BUSY)


def _trouble(error: BaseException) -> Meaning:
    # Who is not let in has no attempt to count: the password is another one now, or the database is being made anew.
    found = (meaning(each) for each in causes(error))
    return next((each for each in found if each.is_passing or each is Meaning.REFUSED), Meaning.OTHER)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield *error*, what it was raised `from`, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def is_the_databases(error: BaseException) -> bool:
    """Say whether *error* is of a database's state, or of our rights in it: another text to write would meet it, too."""
    states = (Meaning.OTHER, Meaning.CANCELLED)
    return is_transient(error) or any(meaning(each) not in states for each in causes(error))


def is_aborted(error: BaseException) -> bool:
    """Say whether PostgreSQL refuses a statement because an earlier one of the transaction failed."""
    return sqlstate(error) == "25P02"


def is_refusal(error: BaseException) -> bool:
    """Say whether a database is there and refuses us as configured."""
    return meaning(error) is Meaning.REFUSED


def first_line(error: BaseException) -> str:
    """Return what a database says, without the line that may show a row."""
    return storable(database.first_line(error))


def describe(error: BaseException) -> tuple[str, str]:
    """Return one line and the traceback, as texts that every database takes."""
    line = "".join(traceback.format_exception_only(error)).strip().splitlines()[0]
    detail = "".join(traceback.format_exception(error))
    return storable(line)[:_MAX_ERROR], storable(detail)[-_MAX_DETAIL:]


def place(error: BaseException) -> str:
    """Return the type of *error* and where it was raised, without its text: that may hold payload."""
    raised = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in raised if "site-packages" not in frame.filename] or raised  # not where a library raised it
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}"


def storable(text: str) -> str:
    """Return *text* without what PostgreSQL refuses: NUL, and lone surrogates."""
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
