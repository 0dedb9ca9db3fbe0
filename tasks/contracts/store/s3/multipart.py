"""A multipart upload out of memory: hashed on its way, with a bounded number of parts in flight."""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from radlads.tasks.contracts.store.s3.probe import abort_upload
from radlads.tasks.contracts.store.s3.seal import Seal, seal_blocks

_PARTS_IN_FLIGHT = 4


def upload_parts(client: Any, place: dict[str, str], parts: Iterable[bytes], part_bytes: int) -> Seal:
    """Upload parts of `part_bytes` each, the last one shorter, as one object, and return their seal.

    place: Bucket and Key. At most `_PARTS_IN_FLIGHT` parts are held beside the one that is hashed. Raises ClientError,
    BotoCoreError; the upload is then aborted.
    """
    upload = client.create_multipart_upload(**place)["UploadId"]
    pending: deque[Future[str]] = deque()
    sent: list[str] = []

    def send(number: int, part: bytes) -> str:
        md5 = base64.b64encode(hashlib.md5(part, usedforsecurity=False).digest()).decode()
        answer = client.upload_part(**place, UploadId=upload, PartNumber=number, Body=part, ContentMD5=md5)
        return str(answer["ETag"])

    def sending(pool: ThreadPoolExecutor) -> Iterator[bytes]:
        for number, part in enumerate(parts, 1):
            if len(pending) == _PARTS_IN_FLIGHT:
                sent.append(pending.popleft().result())
            pending.append(pool.submit(send, number, part))
            yield part

    try:
        with ThreadPoolExecutor(_PARTS_IN_FLIGHT) as pool:
            seal = seal_blocks(sending(pool), part_bytes)
            sent += [future.result() for future in pending]
        listed = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(sent, 1)]
        client.complete_multipart_upload(**place, UploadId=upload, MultipartUpload={"Parts": listed})
    except BaseException:
        with contextlib.suppress(ClientError, BotoCoreError):  # the first error takes precedence
            abort_upload(client, place, upload)
        raise
    return seal
