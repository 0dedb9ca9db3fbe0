"""An S3 client for any endpoint, and its errors in one line of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote, urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
from s3transfer.exceptions import S3UploadFailedError

from radlads.tasks.credentials import credentials_of, hide
from radlads.tasks.job import StoreRef
from radlads.tasks.store_base import StoreError, StoreUnusable

MISSING = {"404", "NoSuchKey", "NotFound"}
TAKEN = {"412", "PreconditionFailed"}
_DENIED = {"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}
_UNSUPPORTED = {"NotImplemented", "MethodNotAllowed", "501", "405"}


def make_client(ref: StoreRef) -> Any:
    """A boto3 S3 client. Credentials come from the SDK's own chain, or from the endpoint's address as it was given.

    Raises StoreUnusable for an address that cannot be one.
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
        # Other endpoints choke on AWS's trailing checksums; integrity is ours to prove anyway.
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
    """Raises StoreUnusable where the user must mend something, StoreError for the rest of the SDK's errors."""
    where = ref.endpoint_url or "AWS"
    try:
        yield
    except (NoCredentialsError, PartialCredentialsError):
        raise StoreUnusable(f"{ref.uri}: no S3 credentials found; set AWS_ACCESS_KEY_ID and friends") from None
    except ClientError as error:
        code = code_of(error)
        if code == "NoSuchBucket":
            raise StoreUnusable(f"bucket '{bucket}' does not exist at {where}; create it first") from None
        if code in _DENIED:
            raise StoreUnusable(f"{ref.uri}: {where} refuses these credentials ({code})") from None
        message = error.response.get("Error", {}).get("Message", "")
        raise StoreError(f"{what}: {where} answers {code}: {hide(message)}") from error
    except (BotoCoreError, S3UploadFailedError) as error:
        raise StoreError(f"{what}: {where}: {hide(' '.join(str(error).split()))}") from error


def is_refused(write: Callable[[], Any]) -> bool:
    """Whether a conditional write onto an existing object is refused, as it should be."""
    try:
        write()
    except ClientError as error:
        if code_of(error) in TAKEN:
            return True
        if code_of(error) in _UNSUPPORTED:
            return False
        raise
    return False


def code_of(error: ClientError) -> str:
    """The protocol's code of an error, or its HTTP status where there is no body."""
    return str(error.response.get("Error", {}).get("Code", ""))
