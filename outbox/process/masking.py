"""What may be shown of a URL: everything that is derived from a setting and read by a person goes through here.

A URL that is written as it should be says where its password is. One that is not (a blank in it, a `/` not encoded, a list,
no scheme) may have it anywhere: of that only the scheme is shown.
"""

from __future__ import annotations

import re
from urllib.parse import SplitResult, urlsplit

ENCODE = "percent-encode what is special in user and password: @ as %40, / as %2F, : as %3A, # as %23, ? as %3F"
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
#: A URL as it should be: no character stands where another could be meant.
_URL = re.compile(
    r"(postgres|postgresql|mysql|mariadb|oracle|mssql|sqlite|amqps?|https?|smtps?|rediss?)(\+\w+)?://"
    r"([^/?#@\s;,]*@)?"  # user and password
    r"([\w.-]*|\[[0-9a-fA-F:.]+\])(:\d+)?"  # host and port
    r"(/[^?#@\s;,]*)?(\?(?P<query>[\w.-]+=[^&?#@\s]*(&[\w.-]+=[^&?#@\s]*)*))?"  # path and parameters
)
#: A file, hence nobody's password.
_FILE = re.compile(r"(sqlite(\+\w+)?|embedded):///[^@]*")
_HOST = re.compile(r"(localhost|[\w-]+(\.[\w-]+)+)(:\d+)?")
_WITH_SCHEME = re.compile(r"://([^\n]*)@")
_WITHOUT_SCHEME = re.compile(r"([^\s:/@]*):[^\s@/][^\s@]*@")
_PARAMETER = re.compile(r"(?i)(?<![\w-])([\w-]*(?:pass|pwd|secret|token|credential)[\w-]*=)('[^']*'|[^&\s]*)")
#: Parameters whose values are no secrets.
_HARMLESS = re.compile(
    r"sslmode|sslrootcert|sslcert|sslkey|cacertfile|certfile|keyfile|server_name_indication|heartbeat|connect_timeout|"
    r"application_name|target_session_attrs|host|port|user|dbname|client_encoding|keepalives\w*|prepare_threshold"
)
_SECRET = re.compile(r"(?i)[\w-]*(pass|pwd|secret|token|credential)[\w-]*")


def shown(value: str) -> str:
    """Return the *value* of a setting that should be a URL, as it may be shown."""
    if match := _URL.fullmatch(value):
        query = match["query"] or ""
        return mask(value.removesuffix(query)) + "&".join(map(_parameter, query.split("&") if query else ()))
    if _FILE.fullmatch(value) or _HOST.fullmatch(value):
        return mask(value)
    scheme = _SCHEME.match(value)
    return f"{scheme[0] if scheme else ''}…"


def _parameter(text: str) -> str:
    """Return a parameter as it may be shown: an unknown name may be the rest of a password that holds an `&`."""
    name = text.partition("=")[0]
    if _HARMLESS.fullmatch(name):
        return text
    return f"{name}=***" if _SECRET.fullmatch(name) else "…"


def has_secret(query: str) -> bool:
    """Say whether a parameter of *query* is a secret; then what looks like another one may be a part of it."""
    return any(_SECRET.fullmatch(part.partition("=")[0]) for part in query.split("&"))


def mask(text: str) -> str:
    """Return a sentence with the passwords of the URLs in it, also those in their parameters, replaced by `***`."""
    text = _WITH_SCHEME.sub(_masked, text) if "://" in text else _WITHOUT_SCHEME.sub(r"\1:***@", text)
    return _PARAMETER.sub(r"\1***", text)


def _masked(match: re.Match[str]) -> str:
    user, colon, _ = match[1].partition(":")
    if re.search(r"[/@\s]", user) and not (user.startswith("/") and not colon):
        return "://***@"  # it may be a part of the password; only a path without a host is none
    return f"://{user}:***@" if colon else match[0]


def split(url: str) -> SplitResult:
    """Return the parts of *url*. Raises ValueError, which, unlike that of the standard library, quotes nothing of it."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - it is read, and may be refused, only when it is asked for
    except ValueError:
        rest = url.partition("://")[2]
        encode = "@" in rest and "@" not in re.split("[/?#]", rest)[0]
        raise ValueError(ENCODE if encode else "it has a host that is none, or a port that is no number up to 65535") from None
    if "@" in url and "@" not in parts.netloc:
        raise ValueError(ENCODE)
    return parts
