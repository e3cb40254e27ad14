"""Shards in S3 and what speaks its language: plain HTTP with a signature (Signature Version 4) on every request.

pyarrow's S3 file system was the other choice. It reads well, but sends no If-Match, retries inside the AWS library
without a trace (so nothing learns of a 503, a Retry-After or a cut), and its threads do not survive a fork. A signature
is a page of code with a published known answer; all the rest of a read is HttpBlob's, tested once for both.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import time
from functools import lru_cache
from urllib.parse import parse_qs, quote, unquote, urlsplit

from .addresses import Address, AddressError, parse_address, redact
from .client import Client
from .connections import Answer
from .credentials import Credentials, Keys
from .remote import HttpBlob
from .retry import StorageError, Trouble

_EMPTY = hashlib.sha256(b"").hexdigest()
_OPTIONS = {"endpoint_override", "scheme", "region", "profile", "anonymous"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}
_PASSING = {"SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "OperationAborted"}
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")


class S3Blob(HttpBlob):
    """`s3://bucket/key`, with options as pyarrow writes them: `?endpoint_override=http://host:port&region=...`.

    `endpoint_override` without a scheme takes it from `scheme`, or https. `anonymous=true` reads public objects without
    keys, `profile` names one of ~/.aws. Endpoint and region default to AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, AWS_REGION
    and AWS_DEFAULT_REGION. Keys in the url are refused: urls travel into manifests and logs.
    """

    def __init__(self, url: str, client: Client, *, identity: str | None = None) -> None:
        bucket, key, options = _parse(url)
        self.region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        super().__init__(_http_url(bucket, key, options, self.region or "us-east-1"), client, identity=identity)
        self.url = f"s3://{bucket}/{key}"
        self._credentials = None if options.get("anonymous") == "true" else _credentials(options.get("profile"))
        self._sent: Keys | None = None

    def headers(self, address: Address, headers: dict[str, str]) -> dict[str, str]:
        if self._credentials is None:
            return headers
        keys = self._sent = self._credentials.get()
        return sign(address, headers, keys, self.region or "us-east-1", time.gmtime())

    def moved(self, answer: Answer, address: Address) -> Address:
        # A signature is for one host: following would mean to sign for whatever host an answer names.
        right = answer.headers["x-amz-bucket-region"]
        raise StorageError(
            self.url,
            f"is not in region {self.region or 'us-east-1'} of this endpoint, which sends elsewhere",
            f"add `?region={right or '...'}` to the url, or name the right endpoint",
            "region",
        )

    def refusal(self, answer: Answer) -> Exception:
        found = re.search(r"<Code>(\w{1,64})</Code>", answer.text())
        code = found[1] if found else None
        if code in _EXPIRED and self._credentials is not None and self._sent and self._credentials.renew(self._sent):
            return Trouble("expired", "the session's keys ran out")
        if code in _PASSING:
            return Trouble("503" if code == "SlowDown" else str(answer.status), f"status {answer.status}, {code}")
        error = super().refusal(answer)
        if not isinstance(error, StorageError) or code is None:
            return error
        remedy = {
            "RequestTimeTooSkewed": "set this machine's clock",
            "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID",
            "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY",
            "AuthorizationHeaderMalformed": "the region is another one: add `?region=...` to the url",
            "NoSuchBucket": "check the bucket's name and the endpoint",
        }.get(code, "check the key, the credentials and their rights, then start the same command again")
        return StorageError(self.url, f"cannot be read (status {answer.status}, {code})", remedy, error.reason)


def sign(address: Address, headers: dict[str, str], keys: Keys, region: str, now: time.struct_time) -> dict[str, str]:
    """The headers of a GET without a body, and those that sign them all (AWS Signature Version 4, service s3)."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", now)
    added = {"x-amz-content-sha256": _EMPTY, "x-amz-date": stamp}
    if keys.token:
        added["x-amz-security-token"] = keys.token
    signed = {name.lower(): " ".join(value.split()) for name, value in {**headers, **added}.items()}
    signed["host"] = address.host_header
    names = ";".join(sorted(signed))
    path, _, query = address.target.partition("?")
    lines = [f"{name}:{signed[name]}" for name in sorted(signed)]
    canonical = "\n".join(["GET", path, query, *lines, "", names, _EMPTY])
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = f"AWS4{keys.secret}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    authorization = f"AWS4-HMAC-SHA256 Credential={keys.access}/{scope},SignedHeaders={names},Signature={signature}"
    return {**headers, **added, "Authorization": authorization}


@lru_cache(maxsize=16)
def _credentials(profile: str | None) -> Credentials:
    return Credentials(profile)


def _parse(url: str) -> tuple[str, str, dict[str, str]]:
    """Bucket, key (not encoded) and options. Raises AddressError."""
    parts = urlsplit(url, allow_fragments=False)  # a key may have a # in it
    if "@" in parts.netloc:
        raise AddressError(
            f"{redact(url)} came with keys in it: give them as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    key = unquote(parts.path[1:])
    if not _BUCKET.fullmatch(parts.netloc) or not key or key.endswith("/"):
        raise AddressError(f"{redact(url)} names no object: write s3://bucket/key")
    options = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
    if unknown := sorted(options.keys() - _OPTIONS):
        raise AddressError(
            f"{redact(url)} has an option {unknown[0]!r} that is not known; there are {', '.join(sorted(_OPTIONS))}"
        )
    return parts.netloc, key, options


def _http_url(bucket: str, key: str, options: dict[str, str], region: str) -> str:
    # S3 signs the path as it is sent, each byte but the unreserved ones encoded.
    path = quote(key, safe="/-._~")
    endpoint = (
        options.get("endpoint_override") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    )
    if endpoint:
        if "://" not in endpoint:
            endpoint = f"{options.get('scheme', 'https')}://{endpoint}"
        if parse_address(endpoint).authorization is not None:
            raise AddressError(f"endpoint {redact(endpoint)} came with a password in it: leave it out")
        return f"{endpoint.rstrip('/')}/{bucket}/{path}"
    if "." in bucket:  # would not match the certificate's one star
        return f"https://s3.{region}.amazonaws.com/{bucket}/{path}"
    return f"https://{bucket}.s3.{region}.amazonaws.com/{path}"
