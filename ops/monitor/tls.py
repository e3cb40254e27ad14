"""Metrics over https, and only to clients that show a certificate where an authority for them is named (mTLS).

The files are those that Prometheus' own programs take (PEM; the certificate may bring its chain). Certificates that are
renewed every few weeks must not end a run of months: files that changed are read again, and what cannot be read leaves
the old ones in use. TLS 1.2 at least. An encrypted key is refused: OpenSSL would ask the terminal for its password.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Protocol

from .ports import ExporterError

RENEWED = 60.0  # seconds between two looks at the files


class TLSError(ExporterError):
    """Certificates that cannot be used."""


class Files(Protocol):
    """`metrics.tls` of a recipe."""

    @property
    def certificate(self) -> Path: ...
    @property
    def key(self) -> Path: ...
    @property
    def client_ca(self) -> Path | None: ...


class Secured:
    """A server's context that follows its files: `look` as one of the exporter's ticks. Raises TLSError."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._seen = self._load()

    def look(self) -> None:
        """Read what changed; new connections are then met with it. An authority that left is trusted until the end."""
        if self._times() != self._seen:
            self._seen = self._load()

    def _times(self) -> list[int]:
        named = (self._files.certificate, self._files.key, self._files.client_ca)
        try:
            return [path.stat().st_mtime_ns for path in named if path is not None]
        except OSError as error:
            raise TLSError(f"metrics.tls: {error.filename} cannot be read ({error.strerror})") from error

    def _load(self) -> list[int]:
        times = self._times()
        # A certificate whose key is still the old one is taken in before the key is found not to fit, and a context that
        # holds such a pair serves nobody: so what is renewed has to fit into a context that nobody uses, first.
        for context in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), self.context):
            self._load_into(context)
        return times

    def _load_into(self, context: ssl.SSLContext) -> None:
        files = self._files
        try:
            context.load_cert_chain(files.certificate, files.key, password=_no_password)
        except (OSError, ValueError) as error:  # SSLError is an OSError
            raise TLSError(
                f"metrics.tls: {files.certificate} and {files.key} are no certificate and its key in PEM, readable for "
                f"this user and without a password ({_reason(error)})"
            ) from error
        if files.client_ca is not None:
            try:
                context.load_verify_locations(files.client_ca)
            except OSError as error:
                raise TLSError(
                    f"metrics.tls: {files.client_ca} holds no certificate of an authority ({_reason(error)})"
                ) from error
            context.verify_mode = ssl.CERT_REQUIRED


def _no_password() -> str:
    raise ValueError("the key is encrypted")


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
