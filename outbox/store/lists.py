"""Lists as parameters: one however long they are, so that a statement stays the same."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

if TYPE_CHECKING:
    from collections.abc import Collection


def among(column: sa.ColumnElement[Any], name: str, type_: Any, dialect: str) -> sa.ColumnElement[bool]:
    """Return `column IN (the list bound to name)` with one parameter, however long the list."""
    if dialect == "postgresql":
        return column == sa.any_(sa.bindparam(name, type_=postgresql.ARRAY(type_)))
    return column.in_(sa.select(_values(name, type_, dialect)))


def outside(column: sa.ColumnElement[Any], name: str, type_: Any, dialect: str) -> sa.ColumnElement[bool]:
    """Return `column NOT IN (the list bound to name)` with one parameter, however long the list.

    A subquery, which every PostgreSQL hashes; before 15 it walks through the list of `<> ALL (array)` for each row.
    """
    return column.not_in(sa.select(_values(name, type_, dialect)))


def _values(name: str, type_: Any, dialect: str) -> sa.ColumnElement[Any]:
    if dialect == "postgresql":
        return sa.func.unnest(sa.bindparam(name, type_=postgresql.ARRAY(type_)))
    return sa.func.json_each(sa.bindparam(name, type_=sa.String())).table_valued("value").c.value


def as_list(values: Collection[Any], dialect: str) -> Any:
    """Return *values* as the parameter that `among` and `outside` take."""
    return list(values) if dialect == "postgresql" else json.dumps(list(values))
