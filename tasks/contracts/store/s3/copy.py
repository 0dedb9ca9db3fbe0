"""Server-side copies within a bucket; the metadata of each records the sha256 of its content."""

from __future__ import annotations

from typing import Any

from boto3.s3.transfer import TransferConfig

from radlads.tasks.contracts.job import FileEntry

_LARGEST_COPY = 5 << 30
"""The most bytes that one CopyObject accepts."""
_NOTE = "sha256"


def copy_noted(
    client: Any, source: dict[str, str], target: dict[str, str], entry: FileEntry, transfer: TransferConfig
) -> None:
    """Copy the object of a product's file. source, target: Bucket and Key. Raises ClientError, BotoCoreError, and
    KeyError if an endpoint's response lacks a field that the SDK reads."""
    noted: dict[str, Any] = {"Metadata": {_NOTE: entry.sha256}, "MetadataDirective": "REPLACE"}
    if entry.size <= _LARGEST_COPY:
        client.copy_object(**target, CopySource=source, **noted)
    else:
        client.copy(source, **target, ExtraArgs=noted, Config=transfer)


def is_noted(head: dict[str, Any], entry: FileEntry) -> bool:
    """Whether an object, by the response to a HEAD request, is such a copy of the file. Some endpoints drop metadata,
    or capitalise its keys."""
    noted = {name.lower(): value for name, value in head["Metadata"].items()}
    return noted.get(_NOTE) == entry.sha256
