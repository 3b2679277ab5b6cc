"""TLS between clients, gateway and engines: contexts from files, exchanged while they are in use, and who may connect.

Certificates are rotated by replacing their files. Connections that stand stay as they are; each new one is made with
what was last found whole and valid, so a half-written or wrong pair costs a line in the log and nothing else.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
import uvicorn
from cryptography import x509

_log = logging.getLogger(__name__)
_DAY = 86400.0
_WARN_SECONDS = 14 * _DAY
_Signature = tuple[tuple[int, int, int] | None, ...]

EventKind = Literal["certificate_reloaded", "certificate_refused", "certificate_expiring"]


class TlsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """PEM files. A listener needs certificate and key; a client needs them where the other side asks who it is."""

    certificate: str | None = None
    """With intermediate certificates after it, if there are any."""
    key: str | None = None
    """None: it is in the file `certificate`."""
    ca: str | None = None
    """Whose certificates are believed. A listener with it refuses clients that have none (mTLS); a client without it
    believes the authorities of the system."""
    allowed_names: tuple[str, ...] = ()
    """Of those, only certificates with one of these subject alternative names: a URI ("spiffe://shoal/gateway") or a
    DNS name, exactly as it stands there. Empty: any; a client then asks for the name that it connected to."""

    @property
    def is_mutual(self) -> bool:
        return self.certificate is not None and self.ca is not None


class TlsError(Exception):
    """The message is for the user."""


class Certificates:
    """The files of a TlsConfig, and the contexts made of them."""

    def __init__(
        self,
        config: TlsConfig,
        *,
        on_event: Callable[[EventKind, str], None] = lambda kind, message: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises TlsError. `clock` gives Unix seconds: certificates are dated by the calendar."""
        self._config = config
        self._on_event = on_event
        self._clock = clock
        self._files = tuple(file for file in (config.certificate, config.key, config.ca) if file is not None)
        self._contexts: list[_Exchanged] = []
        self._refused: str | None = None
        self._warned_at = -_DAY
        self._loaded = self._seen = self._signature()
        self._dates = self._checked_dates()

    def server_context(self) -> ssl.SSLContext:
        if self._config.certificate is None:
            raise TlsError("tls.certificate is not set: a listener needs one, and its key")
        if self._config.allowed_names and self._config.ca is None:
            raise TlsError(
                "tls.allowed_names is set and tls.ca is not: a listener asks for certificates only with tls.ca"
            )
        return self._context(server_side=True)

    def client_context(self) -> ssl.SSLContext:
        return self._context(server_side=False)

    async def watch(self, seconds: float = 1.0) -> None:
        """Until cancelled: keep the contexts up to date."""
        while True:
            self.look()
            await asyncio.sleep(seconds)

    def look(self) -> None:
        """Exchange the contexts if the files have changed. A change counts once two looks have found the same, for
        files are written one after the other."""
        found = self._signature()
        if found == self._loaded:
            self._refused = None
        elif found == self._seen:
            self._reload(found)
        self._seen = found
        self._warn()

    def _reload(self, found: _Signature) -> None:
        try:
            dates = self._checked_dates()
            contexts = [self._built(context.server_side) for context in self._contexts]
            if self._signature() != found:
                return  # written to meanwhile: looked at again
        except TlsError as error:
            if str(error) != self._refused:
                self._refused = str(error)
                self._say("certificate_refused", f"{error}; what was loaded before stays in use")
            return
        for old, new in zip(self._contexts, contexts, strict=True):
            old.exchange(new)
        self._loaded, self._dates, self._refused, self._warned_at = found, dates, None, -_DAY
        last = min((f"{_date(end)}" for _, end in dates), default="unknown")
        self._say("certificate_reloaded", f"{', '.join(self._files)}: loaded, valid until {last}")

    def _context(self, *, server_side: bool) -> ssl.SSLContext:
        context = _Exchanged.over(self._built(server_side), server_side)
        self._contexts.append(context)
        return context

    def _built(self, server_side: bool) -> ssl.SSLContext:
        config = self._config
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            if config.ca is not None:
                context.load_verify_locations(config.ca)
            elif not server_side:
                context.load_default_certs()
        except (OSError, ssl.SSLError) as error:
            raise TlsError(f"tls.ca {config.ca} cannot be used: {_reason(error)}") from None
        try:
            if config.certificate is not None:
                context.load_cert_chain(config.certificate, config.key, password="")
        except (OSError, ssl.SSLError) as error:
            pair = f"tls.certificate {config.certificate} with tls.key {config.key or config.certificate}"
            raise TlsError(f"{pair} cannot be used: {_reason(error)}") from None
        if server_side and config.ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            # No resumption: a ticket would let a client in after its certificate has expired.
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.num_tickets = 0
        if config.allowed_names:
            context.check_hostname = False
        names = frozenset(config.allowed_names)
        context.sslobject_class = _checking(ssl.SSLObject, names)
        context.sslsocket_class = _checking(ssl.SSLSocket, names)
        return context

    def _checked_dates(self) -> list[tuple[str, float]]:
        """Of each certificate that is not expired already: file, Unix second of its end. The own one must be valid."""
        now, dates = self._clock(), []
        for field, file in (("certificate", self._config.certificate), ("ca", self._config.ca)):
            if file is None:
                continue
            try:
                with open(file, "rb") as opened:
                    found = x509.load_pem_x509_certificates(opened.read())
            except OSError as error:
                raise TlsError(f"tls.{field} {file} cannot be read: {error.strerror}") from None
            except ValueError:
                raise TlsError(f"tls.{field} {file} is no PEM file with a certificate") from None
            own = found[0]
            if field == "certificate" and own.not_valid_after_utc.timestamp() <= now:
                raise TlsError(f"tls.certificate {file} expired on {_date(own.not_valid_after_utc.timestamp())}")
            if field == "certificate" and own.not_valid_before_utc.timestamp() > now:
                begin = _date(own.not_valid_before_utc.timestamp())
                raise TlsError(f"tls.certificate {file} is not valid before {begin}: is this machine's clock right?")
            ends = (certificate.not_valid_after_utc.timestamp() for certificate in found)
            dates += [(file, end) for end in ends if end > now]
        return dates

    def _warn(self) -> None:
        now = self._clock()
        if now - self._warned_at < _DAY:
            return
        self._warned_at = now
        for file, end in self._dates:
            if end - now < _WARN_SECONDS:
                left = (end - now) / _DAY
                days = f"expires in {left:.1f} days" if left > 0 else "has expired"
                self._say("certificate_expiring", f"{file} {days}, on {_date(end)}: replace the file, and it is loaded")

    def _say(self, kind: EventKind, message: str) -> None:
        _log.log(logging.INFO if kind == "certificate_reloaded" else logging.WARNING, "TLS: %s", message)
        self._on_event(kind, message)

    def _signature(self) -> _Signature:
        return tuple(_file_signature(file) for file in self._files)


class _Exchanged(ssl.SSLContext):
    """Stands where a context is asked for once and for all, and makes each connection with the newest one.

    Every TLS connection of Python begins with one of these two calls, whoever makes it: asyncio, uvloop, anyio.
    """

    server_side: bool
    _newest: ssl.SSLContext
    _alpn: list[str] | None = None

    @classmethod
    def over(cls, context: ssl.SSLContext, server_side: bool) -> _Exchanged:
        self = cls(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
        self.server_side, self._newest = server_side, context
        self.check_hostname, self.verify_mode = context.check_hostname, context.verify_mode  # for who reads them
        return self

    def exchange(self, context: ssl.SSLContext) -> None:
        if self._alpn is not None:
            context.set_alpn_protocols(self._alpn)
        self._newest = context

    def set_alpn_protocols(self, alpn_protocols: Any) -> None:
        self._alpn = list(alpn_protocols)
        self._newest.set_alpn_protocols(self._alpn)

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        return self._newest.wrap_bio(*args, **kwargs)

    def wrap_socket(self, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        return self._newest.wrap_socket(*args, **kwargs)


def _checking(base: Any, names: frozenset[str]) -> Any:
    """A class of connections whose handshake fails where the other side's certificate has none of the names."""

    class Checking(base):  # type: ignore[misc]
        def do_handshake(self, *args: Any) -> None:
            try:
                super().do_handshake(*args)
                if names:
                    _require_name((self.getpeercert() or {}).get("subjectAltName", ()), names)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except ssl.SSLError as error:
                if self.server_side:
                    # asyncio says nothing, and closes the connection without telling the client either.
                    _log.warning("TLS: a connection was refused: %s", _reason(error))
                raise

    return Checking


def _require_name(alternatives: Iterable[tuple[str, str]], names: frozenset[str]) -> None:
    has = [name for kind, name in alternatives if kind in ("URI", "DNS")]
    if names.isdisjoint(has):
        wanted = " or ".join(sorted(names))
        raise ssl.SSLCertVerificationError(f"the certificate is of {', '.join(has) or 'no name'}, not of {wanted}")


def use_tls(config: uvicorn.Config, context: ssl.SSLContext) -> uvicorn.Config:
    """Have a server of this configuration speak TLS."""
    config.load()
    config.ssl = context
    return config


def require_safe_listener(host: str, tls: TlsConfig | None, *, allow_remote: bool, name: str = "listener") -> None:
    """For listeners that ask for no key. Raises TlsError unless it is on loopback, or on purpose beyond it and asks for
    certificates."""
    try:
        found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise TlsError(f"{name}: host {host!r} cannot be resolved: {error.strerror}") from None
    if all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found):
        return
    where = host or "(all addresses)"
    if not allow_remote:
        raise TlsError(
            f"{name}: {where} can be reached from other machines: use 127.0.0.1, or set allow_remote together with "
            "tls.certificate, tls.key and tls.ca"
        )
    if tls is None or not tls.is_mutual:
        missing = "tls.certificate" if tls is None or tls.certificate is None else "tls.ca"
        raise TlsError(
            f"{name}: {where} can be reached from other machines, and {missing} is not set: beyond loopback it needs "
            "mTLS (tls.certificate, tls.key, tls.ca)"
        )


def _file_signature(file: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _reason(error: OSError) -> str:
    """Without the number and the line of C that ssl puts around it."""
    if isinstance(error, ssl.SSLCertVerificationError) and getattr(error, "verify_message", None):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        reason = getattr(error, "reason", None)
        if reason is None:
            return str(error.args[-1])
        reason = reason.replace("_", " ").lower()
        return "the key is not the certificate's" if reason == "key values mismatch" else reason
    return str(error.strerror or error)
