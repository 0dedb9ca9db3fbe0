"""What can go wrong with a store, each in one line."""

from __future__ import annotations

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.job import SCHEMA_VERSION, Manifest


class StoreError(Exception):
    """The store could not do what was asked."""


class StoreUnusable(StoreError, UserError):  # noqa: N818
    """The store cannot be reached as configured: no such bucket, no credentials, not a folder."""


class CorruptArtifact(StoreError):  # noqa: N818
    """A committed product is torn or altered: a file is missing, or its size or sha256 is not the manifest's."""


class CommitConflict(StoreError, UserError):  # noqa: N818
    """Another writer committed something else at this place."""


def conflict(uri: str, existing: str, wanted: str) -> CommitConflict:
    """The error for a place that holds another digest."""
    return CommitConflict(
        f"{uri} already holds another product (digest {existing[:12]}, this one has {wanted[:12]}): nothing is "
        "overwritten; another process writes there, or files were moved by hand"
    )


def misplaced(uri: str, found: str) -> CorruptArtifact:
    """The error for a product that lies where its digest does not belong."""
    return corrupt(uri, f"it holds the product {found[:12]}, which does not belong there")


def older_schema(uri: str, manifest: Manifest) -> str:
    """Why a product of another schema version is not compared with what is asked for."""
    return (
        f"{uri} was made by another version of radlads (schema {manifest.schema_version}, this one has "
        f"{SCHEMA_VERSION}), so it cannot be told whether it is what is asked for"
    )


def corrupt(uri: str, fault: str) -> CorruptArtifact:
    """The error for a product that is damaged where it lies."""
    return CorruptArtifact(f"{uri}: {fault}; delete this prefix to have it made again")


def unsteady(uri: str, fault: str) -> StoreError:
    """The error for answers that contradict each other: the way to the store is at fault, or nobody can tell."""
    return StoreError(
        f"{uri}: {fault}, and the store's answers contradict each other: nothing is known to be damaged, so delete "
        "nothing; see whether the store and the network are well, and try again"
    )
