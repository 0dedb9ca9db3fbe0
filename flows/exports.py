"""Where `radlads export` takes a model from, and where it puts it: a folder or file, an S3 prefix, a hub repository."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from radlads.tasks.contracts.errors import UserError
from radlads.tasks.contracts.parsing.document import one_line
from radlads.tasks.contracts.parsing.files import file_errors

if TYPE_CHECKING:
    from radlads.tasks.contracts.store.base import Store

_HUB = "hub:"


def published_folder(model: str, *, stage: str | None, store: str | None, work: str | None) -> Path:
    """The folder that a run published, with its card, else that of its last model (or of `stage`). model: a run's name,
    or an exported folder. Raises UserError."""
    from radlads.flows.talkers import fetch_model, find_talkers
    from radlads.tasks.contracts.settings import check_run_name, resolve_settings
    from radlads.tasks.contracts.stages import PUBLISH
    from radlads.tasks.contracts.store.open import find_store
    from radlads.tasks.contracts.store.pointers import read_pointer

    if stage is None and not Path(model).is_dir() and "/" not in model:
        settings = resolve_settings(store=store, work=work)
        place = find_store(settings.store)
        pointer = read_pointer(place, check_run_name(model), PUBLISH.name)
        if pointer is not None and place.read_manifest(place.key(pointer.uri)) is not None:
            return fetch_model(place, place.key(pointer.uri), pointer.digest, settings.work)
    found = find_talkers(model, ("student",), stage=stage, teacher_path=None, store=store, work=work)
    [talker] = found["talkers"]
    if not talker.is_student:
        raise UserError(f"{model} is no converted model")
    return Path(talker.path)


def gguf_target(to: str) -> Path:
    """The GGUF file that `--to` names. Raises UserError where none can be put."""
    if to.startswith(("s3://", _HUB)):
        raise UserError(f"--to {one_line(to, 80)}: a GGUF file is written on this machine; name a path")
    target = Path(to).expanduser().absolute()
    with file_errors(str(target)):
        if target.exists():
            raise UserError(f"{target} exists already; name a new file")
    return target


class Destination:
    """A place for a model: `folder` is filled first, `send` takes it there. Closed, nothing temporary is left."""

    def __init__(self, to: str, *, public: bool) -> None:
        """Raises UserError where nothing can be put."""
        self._to, self._public = to, public
        self._temporary: Path | None = None
        self._parent = self._name = ""
        if to.startswith(("s3://", _HUB)):
            self._check_remote()
            self._temporary = Path(tempfile.mkdtemp(prefix="radlads-export-"))
            self.folder = self._temporary / "model"
            return
        if public:
            raise UserError("--public is for hub:OWNER/NAME")
        self.folder = Path(to).expanduser().absolute()
        with file_errors(str(self.folder)):
            if self.folder.exists():
                raise UserError(f"{self.folder} exists already; name a new folder")

    def __enter__(self) -> Destination:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def check_card(self, source: Path) -> None:
        """Raises UserError where a model that goes to the hub has no card, or one that the hub would refuse."""
        if not self._to.startswith(_HUB):
            return
        from huggingface_hub import ModelCard
        from yaml import YAMLError

        card = source / "README.md"
        if not card.is_file():
            raise UserError("this model has no card: publish the run first (its recipe's section publish)")
        try:
            data = ModelCard.load(card).data
        except (ValueError, TypeError, OSError, YAMLError) as error:
            raise UserError(f"the model's card cannot be read: {one_line(str(error), 200)}") from error
        if data.license is None:
            raise UserError("the model's card names no license: set publish.license in the recipe and publish it anew")

    def send(self) -> str:
        """Take the folder there; where it is now. Raises UserError."""
        if self._to.startswith(_HUB):
            return self._send_to_hub()
        return str(self.folder) if self._temporary is None else self._send_to_s3()

    def _check_remote(self) -> None:
        if self._to.startswith(_HUB):
            name = self._to.removeprefix(_HUB)
            if name.count("/") != 1 or not all(name.split("/")):
                raise UserError(f"--to {one_line(self._to, 80)}: write a repository as hub:OWNER/NAME")
            return
        if self._public:
            raise UserError("--public is for hub:OWNER/NAME")
        parent, _, name = self._to.rstrip("/").rpartition("/")
        if parent.count("/") < 2 or not name:
            raise UserError(f"--to {one_line(self._to, 80)}: name a prefix, as in s3://bucket/prefix")
        self._parent, self._name = parent, name
        if self._store().list(name):
            raise UserError(f"there are files under {self._to} already; name an empty prefix")

    def _store(self) -> Store:
        from radlads.tasks.contracts.settings import resolve_settings
        from radlads.tasks.contracts.store.open import open_store

        return open_store(resolve_settings(store=self._parent).store)

    def _send_to_s3(self) -> str:
        store = self._store()
        # The config last: a folder that was sent in part is no model.
        for path in sorted(self.folder.iterdir(), key=lambda path: (path.name == "config.json", path.name)):
            store.put_file(f"{self._name}/{path.name}", path)
        return str(store.join(self._name))

    def _send_to_hub(self) -> str:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

        api, name = HfApi(), self._to.removeprefix(_HUB)
        try:
            api.create_repo(name, private=not self._public, exist_ok=True)
            found = api.upload_folder(repo_id=name, folder_path=self.folder, commit_message="Exported by radlads")
        except LocalTokenNotFoundError as error:
            raise UserError("the hub does not know you: set HF_TOKEN, or log in with `hf auth login`") from error
        except (HfHubHTTPError, OSError) as error:
            raise UserError(f"the hub did not take {name}: {one_line(str(error), 200)}") from error
        return str(found.commit_url)
