"""Addresses of servers and databases, which hold passwords, and are printed, logged and stored everywhere."""

from __future__ import annotations

import re
import traceback
from base64 import b64encode
from typing import Any, Self
from urllib.parse import quote, unquote, urlsplit

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
#: They have one host, and characters outside of this set are written with percent signs (RFC 3986).
WEB = ("http://", "https://")
_HIDDEN = "***"
_LONGEST_SWITCH = 3


class LibraryError(Exception):
    """What a library said, in whose own words stood a secret."""


class Address(str):
    """An address as people and files may see it: as a string it has no user name, no password and no query.

    It is a string, so that whatever prints it, logs it, stores it as JSON or puts it into an error gets what may be
    seen. `reveal` gives the whole, and so does unpickling. What is seen of a web address still leads to its server:
    libraries get that, and `authorization` apart from it.
    """

    __slots__ = ("_path", "_whole")
    _whole: str
    _path: bool

    def __new__(cls, whole: str, *, path: bool = True) -> Self:
        """path: whether the path may be seen: that of a webhook is its password."""
        if isinstance(whole, Address):
            return cls(whole.reveal(), path=path and whole._path)
        self = super().__new__(cls, _shown(whole, path))
        self._whole, self._path = whole, path
        return self

    def reveal(self) -> str:
        """The whole address, for the library that connects to it and for nobody else."""
        return self._whole

    @property
    def location(self) -> str:
        """The whole without its name and password: where a request goes that says them in its headers."""
        login = _login(self._whole)
        return self._whole.replace(f"{login}@", "", 1) if login else self._whole

    @property
    def for_library(self) -> str:
        """What a library connects to: the whole, but a web address without its name and password, which the library's
        own errors would repeat.
        """
        return str(self) if self.is_web else self._whole

    @property
    def is_web(self) -> bool:
        return self.startswith(WEB)

    @property
    def login(self) -> tuple[str, str] | None:
        """The user's name and password that stand in it, decoded."""
        name, _, password = _login(self._whole).partition(":")
        return (unquote(name), unquote(password)) if name or password else None

    @property
    def authorization(self) -> dict[str, str]:
        """The header that says the same to a web server; urllib would take it for part of the host's name."""
        return authorization(*self.login) if self.login is not None else {}

    def conceal(self, text: str) -> str:
        """The text without what the address hides."""
        for secret in self._secrets():
            text = text.replace(secret, _HIDDEN)
        return text

    def without_secrets(self, error: BaseException) -> BaseException:
        """The error itself, or, where it or one that led to it says a secret, another one that does not."""
        said = "".join(traceback.format_exception(error))
        if self.conceal(said) == said:
            return error
        return LibraryError(f"{type(error).__name__}: {self.conceal(str(error))}")

    def _secrets(self) -> list[str]:
        """Longest first, so that no part of one is left."""
        if self._whole == str(self):
            return []
        login, (_, _, query) = _login(self._whole), self._whole.partition("?")
        values = [pair.partition("=")[2] for pair in query.split("&")]
        # Shorter ones are switches (ssl=1), and every number and line of an error has such letters.
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
            raise ValueError("an address is a string")
        return cls(value)


def authorization(name: str, password: str) -> dict[str, str]:
    """The header of HTTP's basic authentication (RFC 7617)."""
    return {"Authorization": f"Basic {b64encode(f'{name}:{password}'.encode()).decode()}"}


def web_address(text: str, *, path: bool = True) -> Address:
    """The address of a web server. Raises ValueError, in whose words the address does not stand."""
    address = Address(text, path=path)
    if not text.startswith(WEB):
        raise ValueError("is not an address that begins with http:// or https://")
    if not text.isprintable() or " " in text or not text.isascii():
        raise ValueError("holds a space, a line's end or another character that stands in no address; write it as %20")
    try:
        parts = urlsplit(text)
        known = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        known = False
    if not known or "@" in address or (path and "@" in parts.path):
        raise ValueError("names no host. Write the characters @, / and : of a password as %40, %2F and %3A")
    return address


def holds_login(place: str) -> bool:
    """Whether a place in object storage, such as `s3://http://user:password@host:9000/bucket`, holds a password."""
    return re.match(r"[a-z0-9]+://(https?://)?+[^/]*?(:(?!\d+/)[^/]*/.*)?@", place) is not None


def _shown(whole: str, path: bool) -> str:
    scheme = _SCHEME.match(whole)
    if scheme is None or scheme[0] == "sqlite://":  # a file's name; it has no password, and may have any character
        return whole
    rest = re.split(r"[?#]", whole[scheme.end() :], maxsplit=1)[0].removeprefix(f"{_login(whole)}@")
    return f"{scheme[0]}{rest if path else rest.partition('/')[0]}"


def _login(whole: str) -> str:
    """`user:password` as it stands there; empty without one."""
    scheme = _SCHEME.match(whole)
    if scheme is None or scheme[0] == "sqlite://":
        return ""
    rest = whole[scheme.end() :]
    # SQLAlchemy takes all before the last @ for the password; of a web address the host ends with the first slash.
    rest = re.split(r"[/?#]", rest, maxsplit=1)[0] if scheme[0] in WEB else rest.partition("?")[0]
    return rest.rpartition("@")[0]


def _again(whole: str, path: bool) -> Address:
    return Address(whole, path=path)
