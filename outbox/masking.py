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
    r"[a-zA-Z][a-zA-Z0-9+.-]*://"
    r"([^/?#@\s;,]*@)?"  # user and password
    r"([\w.-]*|\[[0-9a-fA-F:.]+\])(:\d+)?"  # host and port
    r"(/[^?#@\s;,]*)?(\?[^=#@\s]+=[^#@\s]*)?"  # path and parameters
)
#: A file, hence nobody's password.
_FILE = re.compile(r"(sqlite(\+\w+)?|embedded):///[^@]*")
_HOST = re.compile(r"(localhost|[\w-]+(\.[\w-]+)+)(:\d+)?")
_WITH_SCHEME = re.compile(r"://([^\n]*)@")
_WITHOUT_SCHEME = re.compile(r"([^\s:/@]*):[^\s@/][^\s@]*@")
_PARAMETER = re.compile(r"(?i)(?<![\w-])([\w-]*(?:pass|pwd|secret|token|credential)[\w-]*=)('[^']*'|[^&\s]*)")


def shown(value: str) -> str:
    """Return the *value* of a setting that should be a URL, as it may be shown."""
    if any(form.fullmatch(value) for form in (_URL, _FILE, _HOST)):
        return mask(value)
    scheme = _SCHEME.match(value)
    return f"{scheme[0] if scheme else ''}…"


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
