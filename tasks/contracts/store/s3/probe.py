"""Probes which conditions an S3 endpoint honours, with requests that it should refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from botocore.exceptions import ClientError

from radlads.tasks.contracts.store.s3.client import MISSING, TAKEN, code_of

_UNSUPPORTED = {"NotImplemented", "MethodNotAllowed", "501", "405"}


def probe_endpoint(client: Any, place: dict[str, str]) -> dict[str, bool]:
    """Whether conditions are honoured: {"conditional_put", "conditional_replace", "conditional_multipart"}, and
    "bare_etags": whether it matches an ETag only without its quotes.

    place: Bucket and Key of an object to write and remove. Raises ClientError, BotoCoreError.
    """
    stale = client.put_object(**place, Body=b"0")["ETag"]
    try:
        put = _is_refused(lambda: client.put_object(**place, Body=b"2", IfNoneMatch="*"))
        etag = client.put_object(**place, Body=b"1")["ETag"]
        bare = _is_refused(lambda: client.put_object(**place, Body=b"1", IfMatch=etag))
        if bare:
            stale, etag = stale.strip('"'), etag.strip('"')
        replace = not _is_refused(lambda: client.put_object(**place, Body=b"1", IfMatch=etag)) and _is_refused(
            lambda: client.put_object(**place, Body=b"3", IfMatch=stale)
        )
        upload = client.create_multipart_upload(**place)["UploadId"]
        part = client.upload_part(**place, UploadId=upload, PartNumber=1, Body=b"4")["ETag"]
        parts = {"Parts": [{"PartNumber": 1, "ETag": part}]}
        multipart = _is_refused(
            lambda: client.complete_multipart_upload(**place, UploadId=upload, MultipartUpload=parts, IfNoneMatch="*")
        )
        if multipart:
            abort_upload(client, place, upload)
    finally:
        client.delete_object(**place)
    return {
        "conditional_put": put,
        "conditional_replace": replace,
        "conditional_multipart": multipart,
        "bare_etags": bare,
    }


def abort_upload(client: Any, place: dict[str, str], upload: str) -> None:
    """Abort a multipart upload; one that no longer exists is no error. Raises ClientError."""
    try:
        client.abort_multipart_upload(**place, UploadId=upload)
    except ClientError as error:
        if code_of(error) not in {"NoSuchUpload", *MISSING}:
            raise


def _is_refused(write: Callable[[], Any]) -> bool:
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


def abort_unfinished_uploads(client: Any, bucket: str, prefix: str) -> None:
    """Abort every multipart upload below a prefix. Raises ClientError, BotoCoreError."""
    pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix)
    for upload in [item for page in pages for item in page.get("Uploads", [])]:
        if upload["Key"].startswith(prefix):
            abort_upload(client, {"Bucket": bucket, "Key": upload["Key"]}, upload["UploadId"])
