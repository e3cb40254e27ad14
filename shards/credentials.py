"""Keys for S3: from the environment, the shared files, a helper program, or the machine that the run is on.

The order is that of AWS' own tools: environment; profile in the shared files (keys or `credential_process`); web
identity (EKS); container endpoint (ECS, EKS); instance metadata, version 2. Nothing of it is ever part of a url or a
recipe, and keys show in no `repr`. What this list lacks (single sign-on, chained roles) comes through
`credential_process = aws configure export-credentials --format process`.
"""

from __future__ import annotations

import configparser
import http.client
import json
import os
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from urllib.parse import quote, urljoin

from . import forks
from .addresses import AddressError, parse_address
from .errors import GristmillError

_EARLY = 300.0  # seconds before their end that keys are renewed
_BROKEN = (
    KeyError,
    ValueError,
    OSError,
    AddressError,
    configparser.Error,
    subprocess.SubprocessError,
    http.client.HTTPException,
)
_PATIENCE = 2.0  # seconds for an answer of the machine itself


class CredentialsError(GristmillError):
    """No keys for S3, or none that can be used."""


@dataclass(frozen=True)
class Keys:
    """An access key, its secret, and the token of a session. `expires` in seconds since 1970, None for never."""

    access: str = field(repr=False)
    secret: str = field(repr=False)
    token: str | None = field(default=None, repr=False)
    expires: float | None = None


class Credentials:
    """Keys, found when first needed and renewed before they run out. Safe between threads."""

    def __init__(self, profile: str | None = None, environ: Mapping[str, str] = os.environ) -> None:
        self.profile, self.environ = profile, environ
        self._keys: Keys | None = None
        self._lock = threading.Lock()
        forks.tell(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()

    def get(self) -> Keys:
        """Keys that are good now. Raises CredentialsError."""
        with self._lock:
            keys = self._keys
            if keys is None or (keys.expires is not None and keys.expires - _EARLY < time.time()):
                self._keys = keys = find_keys(self.profile, self.environ)
            return keys

    def renew(self, refused: Keys) -> bool:
        """The server says that these ran out: forget them. False if finding again gives the same ones."""
        with self._lock:
            if self._keys == refused:
                self._keys = find_keys(self.profile, self.environ)
            return self._keys != refused


def find_keys(profile: str | None, environ: Mapping[str, str]) -> Keys:
    """The first keys that any source has. Raises CredentialsError."""
    sources: list[Callable[[], Keys | None]] = [
        lambda: _shared_files(profile or environ.get("AWS_PROFILE", "default"), environ),
        lambda: _web_identity(environ),
        lambda: _container(environ),
        lambda: _instance(environ),
    ]
    if profile is None:
        sources.insert(0, lambda: _environment(environ))
    else:
        del sources[1:]  # a profile that was asked for is not replaced by something else
    for source in sources:
        try:
            keys = source()
        except _BROKEN as error:
            raise CredentialsError(
                f"keys for S3 cannot be had ({type(error).__name__}): check the AWS_* variables and ~/.aws"
            ) from None  # the cause may quote a key
        if keys is not None:
            return keys
    raise CredentialsError(
        (f"profile {profile} has no keys for S3" if profile else "there are no keys for S3")
        + ": set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile in ~/.aws/credentials; for a public bucket add "
        "`?anonymous=true` to the url"
    )


def _environment(environ: Mapping[str, str]) -> Keys | None:
    access, secret = environ.get("AWS_ACCESS_KEY_ID"), environ.get("AWS_SECRET_ACCESS_KEY")
    return Keys(access, secret, environ.get("AWS_SESSION_TOKEN")) if access and secret else None


def _shared_files(profile: str, environ: Mapping[str, str]) -> Keys | None:
    found: dict[str, str] = {}
    home = Path(environ.get("HOME", "~")).expanduser() / ".aws"
    for variable, name in (("AWS_CONFIG_FILE", "config"), ("AWS_SHARED_CREDENTIALS_FILE", "credentials")):
        parser = configparser.RawConfigParser()
        parser.read(environ.get(variable, home / name), encoding="utf-8")
        for section in (f"profile {profile}", profile):
            if parser.has_section(section):
                found |= dict(parser.items(section))
    if "aws_access_key_id" in found:
        return Keys(found["aws_access_key_id"], found["aws_secret_access_key"], found.get("aws_session_token"))
    if "credential_process" in found:
        answer = subprocess.run(
            shlex.split(found["credential_process"]), capture_output=True, timeout=60, check=False, env=dict(environ)
        )
        if answer.returncode:
            raise CredentialsError(f"credential_process of profile {profile} failed (exit code {answer.returncode})")
        return _from_json(json.loads(answer.stdout), "SessionToken")
    return None


def _web_identity(environ: Mapping[str, str]) -> Keys | None:
    token_file, role = environ.get("AWS_WEB_IDENTITY_TOKEN_FILE"), environ.get("AWS_ROLE_ARN")
    if not token_file or not role:
        return None
    region = environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    service = environ.get("AWS_ENDPOINT_URL_STS", f"https://sts.{region}.amazonaws.com")
    query = {
        "Action": "AssumeRoleWithWebIdentity",
        "Version": "2011-06-15",
        "RoleArn": role,
        "RoleSessionName": environ.get("AWS_ROLE_SESSION_NAME", "gristmill"),
        "WebIdentityToken": Path(token_file).read_text(encoding="utf-8").strip(),
    }
    text = _ask(f"{service}/?" + "&".join(f"{name}={quote(value, safe='')}" for name, value in query.items()))
    tags = {}
    for tag in ("AccessKeyId", "SecretAccessKey", "SessionToken", "Expiration"):
        found = re.search(f"<{tag}>([^<]+)</{tag}>", text)
        if found:
            tags[tag] = found[1]
    return _from_json(tags, "SessionToken")


def _container(environ: Mapping[str, str]) -> Keys | None:
    relative, full = (environ.get(f"AWS_CONTAINER_CREDENTIALS_{kind}_URI") for kind in ("RELATIVE", "FULL"))
    if not relative and not full:
        return None
    token = environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN")
    if "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE" in environ:
        token = Path(environ["AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"]).read_text(encoding="utf-8").strip()
    url = full or f"http://169.254.170.2{relative}"
    return _from_json(json.loads(_ask(url, headers={"Authorization": token} if token else {})), "Token")


def _instance(environ: Mapping[str, str]) -> Keys | None:
    if environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return None
    base = environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254").rstrip("/") + "/latest/"
    try:
        token = _ask(base + "api/token", "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": "21600"})
    except (OSError, http.client.HTTPException):
        return None  # no such machine
    headers = {"X-aws-ec2-metadata-token": token}
    roles = urljoin(base, "meta-data/iam/security-credentials/")
    role = _ask(roles, headers=headers).split()
    return _from_json(json.loads(_ask(roles + role[0], headers=headers)), "Token") if role else None


def _from_json(found: Mapping[str, str], token: str) -> Keys:
    expires = found.get("Expiration")
    return Keys(
        found["AccessKeyId"],
        found["SecretAccessKey"],
        found.get(token),
        datetime.fromisoformat(expires).timestamp() if expires else None,
    )


def _ask(url: str, method: str = "GET", headers: Mapping[str, str] | None = None) -> str:
    address = parse_address(url)
    kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    connection = kind(address.host, address.port, timeout=_PATIENCE)
    try:
        connection.request(method, address.target, headers=dict(headers or {}))
        answer = connection.getresponse()
        text = answer.read(1 << 20).decode("utf-8")
        if answer.status != 200:
            raise OSError(f"status {answer.status}")
        return text
    finally:
        connection.close()
