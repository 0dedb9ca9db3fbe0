"""An S3 client for any endpoint, and its errors as messages of one line."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import unquote, urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from s3transfer.exceptions import RetriesExceededError, S3UploadFailedError

from radlads.tasks.contracts.job import StoreRef
from radlads.tasks.contracts.parsing.credentials import credentials_of, hide
from radlads.tasks.contracts.store.errors import StoreError, StoreUnusable, corrupt

MISSING = {"404", "NoSuchKey", "NotFound"}
TAKEN = {"412", "PreconditionFailed"}
_DENIED = {"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_ALTERED = {"BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}
_ATTEMPTS = 4
_PAUSE_SECONDS = 0.3


def make_client(ref: StoreRef) -> Any:
    """A boto3 S3 client. Credentials come from the SDK's own chain, or from the endpoint's configured address.

    Raises StoreUnusable for an invalid address.
    """
    own = ref.endpoint_url is not None
    host = urlsplit(ref.endpoint_url).hostname if ref.endpoint_url else None
    config = Config(
        s3={"addressing_style": "path" if own else "auto"},
        retries={"mode": "standard", "max_attempts": 6},
        connect_timeout=10,
        read_timeout=60,
        tcp_keepalive=True,
        max_pool_connections=32,
        # Other endpoints reject AWS's trailing checksums; content is verified by this code anyway.
        request_checksum_calculation="when_required" if own else "when_supported",
        response_checksum_validation="when_required",
        proxies={} if host in ("127.0.0.1", "localhost", "::1") else None,
    )
    region = ref.region or ("us-east-1" if own else None)
    session = boto3.session.Session()  # the default one keeps the first credentials it sees
    keys: dict[str, str] = {}
    if given := credentials_of(ref.endpoint_url or ""):
        access, _, secret = given.partition(":")
        keys = {"aws_access_key_id": unquote(access), "aws_secret_access_key": unquote(secret)}
    try:
        return session.client("s3", endpoint_url=ref.endpoint_url, region_name=region, config=config, **keys)
    except (BotoCoreError, ValueError) as error:
        raise StoreUnusable(f"{ref.uri}: {hide(' '.join(str(error).split()))}") from None


@contextmanager
def plain_errors(ref: StoreRef, bucket: str, what: str) -> Iterator[None]:
    """Raises StoreUnusable for errors that the user must fix, StoreError for the SDK's other errors."""
    where = ref.endpoint_url or "AWS"
    try:
        yield
    except (NoCredentialsError, PartialCredentialsError):
        raise StoreUnusable(f"{ref.uri}: no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from None
    except ClientError as error:
        code = code_of(error)
        if code == "NoSuchBucket":
            raise StoreUnusable(f"bucket '{bucket}' does not exist at {where}; create it first") from None
        if code in _DENIED:
            raise StoreUnusable(f"{ref.uri}: {where} refuses these credentials ({code})") from None
        message = error.response.get("Error", {}).get("Message", "")
        raise StoreError(f"{what}: {where} answers {code}: {hide(message)}") from error
    except (BotoCoreError, S3UploadFailedError, RetriesExceededError) as error:
        raise StoreError(f"{what}: {where}: {hide(' '.join(str(error).split()))}") from error


def put_object(client: Any, place: dict[str, str], data: bytes, *, sha256: bool, **condition: str) -> None:
    """Write a small object with checksums; write it again if the endpoint reports that they do not match.

    sha256: also send this checksum; not every endpoint knows the header. Raises ClientError.
    """
    sums = {"ContentMD5": base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()}
    if sha256:
        sums["ChecksumSHA256"] = base64.b64encode(hashlib.sha256(data).digest()).decode()
    for attempt in range(_ATTEMPTS):
        try:
            client.put_object(**place, Body=data, **sums, **condition)
            return
        except ClientError as error:
            if code_of(error) not in _ALTERED or attempt == _ATTEMPTS - 1:
                raise


def read_object(client: Any, place: dict[str, str], limit: int | None) -> tuple[bytes, str] | None:
    """(content, ETag) of a small object; None if it does not exist. limit: bytes; CorruptArtifact for more.

    A truncated body is read again. So is one whose MD5 is not its ETag, until two reads agree: the ETag of an encrypted
    object is not an MD5. Raises ClientError, BotoCoreError.
    """
    before: bytes | None = None
    for attempt in range(_ATTEMPTS):
        time.sleep(attempt * _PAUSE_SECONDS)
        try:
            answer = client.get_object(**place)
            length = answer["ContentLength"]
            if limit is not None and length > limit:
                raise corrupt(f"s3://{place['Bucket']}/{place['Key']}", f"it is too long ({length:,} bytes)")
            data: bytes = answer["Body"].read()
        except ClientError as error:
            if code_of(error) in MISSING:
                return None
            raise
        except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
            if attempt == _ATTEMPTS - 1:
                raise
            continue
        etag = answer["ETag"]
        if data == before or "-" in etag or hashlib.md5(data, usedforsecurity=False).hexdigest() == etag.strip('"'):
            return data, etag
        before = data
    raise StoreError(f"s3://{place['Bucket']}/{place['Key']}: every read returns different content; try again")


def age_of(head: dict[str, Any]) -> float | None:
    """Seconds since an object was written, from the answer to a HEAD request: both times are the endpoint's."""
    date = head["ResponseMetadata"].get("HTTPHeaders", {}).get("date")
    try:
        now = parsedate_to_datetime(date)
    except (TypeError, ValueError):
        return None
    if now.tzinfo is None:
        return None
    return max(0.0, float((now - head["LastModified"]).total_seconds()))


def code_of(error: ClientError) -> str:
    """The protocol's code of an error, or its HTTP status if it has no body."""
    return str(error.response.get("Error", {}).get("Code", ""))
