"""Addresses of servers and databases, which may hold passwords and are printed, logged and stored everywhere."""

from __future__ import annotations

import re
import traceback
from base64 import b64encode
from typing import Any, Self
from urllib.parse import quote, unquote, urlsplit

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
#: Web addresses have one host, and a percent sign escapes the characters that RFC 3986 does not allow.
WEB = ("http://", "https://")
_HIDDEN = "***"
_LONGEST_SWITCH = 3


class LibraryError(Exception):
    """An error in place of a library's own, whose text contained a secret."""


class Address(str):
    """An address that shows no secrets: as a string it has no user name, no password and no query.

    It is a string, so that code that prints it, logs it, stores it as JSON or puts it into an error gets only the
    visible part. `reveal` returns the whole address, and pickling keeps it. The visible part of a web address still
    leads to its server: libraries get that part, and get `authorization` separately.
    """

    __slots__ = ("_path", "_whole")
    _whole: str
    _path: bool

    def __new__(cls, whole: str, *, path: bool = True) -> Self:
        """Make an address from its whole text.

        Args:
            whole: The address with its secrets.
            path: Whether the path may be seen. The path of a webhook's address is its password.
        """
        if isinstance(whole, Address):
            return cls(whole.reveal(), path=path and whole._path)
        self = super().__new__(cls, _shown(whole, path))
        self._whole, self._path = whole, path
        return self

    def reveal(self) -> str:
        """Return the whole address, for the library that connects to it and for no other use."""
        return self._whole

    @property
    def location(self) -> str:
        """The whole address without name and password, for a request that sends those in its headers."""
        login = _login(self._whole)
        return self._whole.replace(f"{login}@", "", 1) if login else self._whole

    @property
    def for_library(self) -> str:
        """The address that a library connects to.

        That is the whole address. Of a web address it is the visible part, because the library's own errors would
        repeat the name and password.
        """
        return str(self) if self.is_web else self._whole

    @property
    def is_web(self) -> bool:
        """Return whether this is the address of a web server."""
        return self.startswith(WEB)

    @property
    def login(self) -> tuple[str, str] | None:
        """The user's name and password in the address, decoded, or None if it has neither."""
        name, _, password = _login(self._whole).partition(":")
        return (unquote(name), unquote(password)) if name or password else None

    @property
    def authorization(self) -> dict[str, str]:
        """The header with the name and password for a web server.

        They are sent in a header because urllib would take them for part of the host's name.
        """
        return authorization(*self.login) if self.login is not None else {}

    def conceal(self, text: str) -> str:
        """Return the text without the secrets of the address."""
        for secret in self._secrets():
            text = text.replace(secret, _HIDDEN)
        return text

    def without_secrets(self, error: BaseException) -> BaseException:
        """Return the error itself if neither it nor its causes show a secret.

        Otherwise return a LibraryError with the same text and without the secrets.
        """
        said = "".join(traceback.format_exception(error))
        if self.conceal(said) == said:
            return error
        return LibraryError(f"{type(error).__name__}: {self.conceal(str(error))}")

    def _secrets(self) -> list[str]:
        """Return the secrets, the longest first, so that no part of a longer one is left in a text."""
        if self._whole == str(self):
            return []
        login, (_, _, query) = _login(self._whole), self._whole.partition("?")
        values = [pair.partition("=")[2] for pair in query.split("&")]
        # Shorter values are switches (ssl=1). Their letters occur in every number and line of an error.
        parts = [self._whole, login, query, *(value for value in values if len(value) > _LONGEST_SWITCH)]
        if not self._path:
            parts += [urlsplit(self._whole).path.strip("/")]
        if login:
            password = login.partition(":")[2]
            parts += [password, unquote(password), quote(unquote(password), safe="")]
        return sorted({part for part in parts if part}, key=len, reverse=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self._whole, self._path)

    def __eq__(self, other: object) -> bool:
        return self._whole == other._whole if isinstance(other, Address) else str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._validated, serialization=core_schema.to_string_ser_schema()
        )

    @classmethod
    def _validated(cls, value: object) -> Self:
        if not isinstance(value, str):
            raise ValueError("an address must be a string")
        return cls(value)


def authorization(name: str, password: str) -> dict[str, str]:
    """Return the header of HTTP's basic authentication (RFC 7617)."""
    return {"Authorization": f"Basic {b64encode(f'{name}:{password}'.encode()).decode()}"}


def web_address(text: str, *, path: bool = True) -> Address:
    """Return the address of a web server.

    Args:
        text: The address.
        path: Whether the path may be seen.

    Raises:
        ValueError: The text is no address of a web server. The message does not repeat the text.
    """
    address = Address(text, path=path)
    if not text.startswith(WEB):
        raise ValueError("is not an address that begins with http:// or https://")
    if not text.isprintable() or " " in text or not text.isascii():
        raise ValueError(
            "holds a space, a line break or another character that an address cannot hold; write a space as %20"
        )
    try:
        parts = urlsplit(text)
        known = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        known = False
    if not known or "@" in address or (path and "@" in parts.path):
        raise ValueError("names no host. Write the characters @, / and : of a password as %40, %2F and %3A")
    return address


def holds_login(place: str) -> bool:
    """Return whether a place in object storage holds a user's name or password.

    An example is `s3://http://user:password@host:9000/bucket`.
    """
    return re.match(r"[a-z0-9]+://(https?://)?+[^/]*?(:(?!\d+/)[^/]*/.*)?@", place) is not None


def _shown(whole: str, path: bool) -> str:
    scheme = _SCHEME.match(whole)
    if scheme is None or scheme[0] == "sqlite://":  # a file's name has no password and may have any character
        return whole
    rest = re.split(r"[?#]", whole[scheme.end() :], maxsplit=1)[0].removeprefix(f"{_login(whole)}@")
    return f"{scheme[0]}{rest if path else rest.partition('/')[0]}"


def _login(whole: str) -> str:
    """Return the `user:password` of the address as written, or an empty text."""
    scheme = _SCHEME.match(whole)
    if scheme is None or scheme[0] == "sqlite://":
        return ""
    rest = whole[scheme.end() :]
    # SQLAlchemy takes all text before the last @ for the password. In a web address the host ends at the first slash.
    rest = re.split(r"[/?#]", rest, maxsplit=1)[0] if scheme[0] in WEB else rest.partition("?")[0]
    return rest.rpartition("@")[0]


def _again(whole: str, path: bool) -> Address:
    return Address(whole, path=path)
