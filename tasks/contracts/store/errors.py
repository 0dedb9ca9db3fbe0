"""The errors of a store, each with a message of one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from radlads.tasks.contracts.errors import UserError

if TYPE_CHECKING:  # imported where used: the command line reads this module before it knows what is asked
    from radlads.tasks.contracts.job import Manifest


class StoreError(Exception):
    """An operation of the store failed."""


class StoreUnusable(StoreError, UserError):  # noqa: N818
    """The store cannot be reached as configured: no such bucket, no credentials, not a folder."""


class CorruptArtifact(StoreError):  # noqa: N818
    """A committed product is damaged: a file is missing, or its size or sha256 differs from the manifest."""


class CommitConflict(StoreError, UserError):  # noqa: N818
    """Another writer committed something else at this place."""


def conflict(uri: str, existing: str, expected: str) -> CommitConflict:
    """The error for a prefix that holds a product with another digest."""
    return CommitConflict(
        f"{uri} already holds another product (digest {existing[:12]}, this one has {expected[:12]}): nothing is "
        "overwritten; another process writes there, or files were moved by hand"
    )


def misplaced(uri: str, found: str) -> CorruptArtifact:
    """The error for a product that lies under the prefix of another digest."""
    return corrupt(uri, f"it holds the product {found[:12]}, which does not belong there")


def older_schema(uri: str, manifest: Manifest) -> str:
    """Why a product of another schema version cannot be compared with the requested one."""
    from radlads.tasks.contracts.job import SCHEMA_VERSION

    return (
        f"{uri} was made by another version of radlads (schema {manifest.schema_version}, this one has "
        f"{SCHEMA_VERSION}), so it cannot be compared with the requested product"
    )


def corrupt(uri: str, fault: str) -> CorruptArtifact:
    """The error for a product that is damaged in the store."""
    return CorruptArtifact(f"{uri}: {fault}; delete this prefix to have it made again")


def unsteady(uri: str, fault: str) -> StoreError:
    """The error for responses that contradict each other: the connection may be at fault, so damage is not proven."""
    return StoreError(
        f"{uri}: {fault}, and the store's responses contradict each other: damage is not proven, so delete "
        "nothing; check the store and the network, and try again"
    )
