"""What `data.train` and `data.eval` name → rows, one after another: from files, folders and the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvlm_cli.config.nearest import hint
from fvlm_cli.config.schema import DataSection, Sources, SourceSection
from fvlm_cli.data.files import READERS, iterate_file
from fvlm_cli.data.folder import iterate_folder
from fvlm_cli.data.images import check_images, resolve_images
from fvlm_cli.data.row import Row
from fvlm_core.errors import ConfigError, DataError

NAMES = ("messages", "conversations", "prompt", "completion", "images", "image", "videos", "video")
"""The columns that FVLM knows; see `fvlm_vision.samples`."""

_OF_HUB = ("split", "subset", "revision")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class Source:
    """One dataset of a config.

    Args:
        data: the config's section, whose keys hold where the dataset has none of its own.
        section: what was written about it; a name alone is its path.
        key: where it was written, for messages: `data.train[1]`.

    Raises:
        ConfigError: its columns name what FVLM does not know, or it is not on the Hub and has a key for that.
    """

    def __init__(self, data: DataSection, section: str | SourceSection, key: str) -> None:
        self.section = SourceSection(path=section) if isinstance(section, str) else section
        own = self.section
        self.path = Path(own.path).expanduser()
        self.weight = own.weight
        self.columns = data.columns if own.columns is None else own.columns
        self.caption_prompt = data.caption_prompt if own.caption_prompt is None else own.caption_prompt
        folder = data.image_folder if own.image_folder is None else own.image_folder
        self.image_folder = None if folder is None else Path(folder).expanduser()
        for name in self.columns:
            if name not in NAMES:
                where = "data.columns" if own.columns is None else f"{key}.columns"
                raise ConfigError(f"{where}: {name} is no column that FVLM knows; {hint(name, NAMES)}")
        for name in _OF_HUB if not self.on_hub else ():
            value = own.model_dump()[name]
            if value != SourceSection.model_fields[name].default:
                raise ConfigError(
                    f"{key}.{name} is {value!r}, which is for datasets on the Hub, and {own.path} is taken for a file "
                    "or folder; leave it out, or check the path."
                )

    @property
    def on_hub(self) -> bool:
        """Whether it is taken for the id of a dataset on the Hub: nothing here has the name, and it looks like one."""
        known = self.path.suffix.lower() in READERS
        return not known and not self.path.exists() and _HUB_ID.fullmatch(self.section.path) is not None

    @property
    def name(self) -> str:
        """What it is called where its place on this machine tells nothing: the Hub's id, or a file's own name."""
        return self.section.path if self.on_hub else self.path.resolve().name

    def rows(self, *, streaming: bool = False) -> Iterator[Unchecked]:
        """Yield its rows.

        Args:
            streaming: of a dataset on the Hub: do not download it first.

        Raises:
            DataError: the file, folder or dataset cannot be read; the message says where.
        """
        columns, folder = self.columns, self.image_folder
        if self.on_hub:
            from fvlm_cli.data.hub import iterate_hub

            rows = iterate_hub(self.section, streaming)
        elif self.path.is_dir():
            rows = iterate_folder(self.path, self.caption_prompt)
            columns, folder = {}, None  # settled already
        else:
            rows = iterate_file(self.path)
            folder = folder or self.path.parent
        for row in rows:
            yield Unchecked(row, columns, folder)


@dataclass(frozen=True)
class Unchecked:
    """A row as it stands in its dataset.

    Attributes:
        row: as it was read.
        columns: FVLM's name of a column: the dataset's.
        folder: where relative paths of images start; None: they are left as they are.
    """

    row: Row
    columns: dict[str, str]
    folder: Path | None

    def checked(self) -> Row:
        """Return the row with FVLM's names, if it is a sample whose image files begin as images do.

        Raises:
            DataError: it is not; the message has the row's place.
        """
        from fvlm_vision.samples import read_sample

        sample = self._renamed()
        row = Row(sample if self.folder is None else resolve_images(sample, self.folder), self.row.place)
        try:
            conversation = read_sample(row.sample)
        except DataError as error:
            raise row.refuse(error.reason) from None
        check_images(row, conversation.images)
        return row

    def _renamed(self) -> dict[str, Any]:
        columns, theirs = self.columns, self.row.sample
        sample = dict(theirs)
        for name, their_name in columns.items():
            if their_name not in theirs:
                reason = f"it has no column {their_name}, which data.columns names; {hint(their_name, theirs)}"
                raise self.row.refuse(reason)
            sample[name] = theirs[their_name]
        return {name: value for name, value in sample.items() if name in columns or name not in columns.values()}


def sources_of(data: DataSection, written: Sources, key: str) -> list[Source]:
    """Return the datasets that a key of the config names.

    Raises:
        ConfigError: a dataset's columns name what FVLM does not know.
    """
    if isinstance(written, list):
        return [Source(data, section, f"{key}[{number}]") for number, section in enumerate(written)]
    return [Source(data, written, key)]
