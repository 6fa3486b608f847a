"""The documents of a Hugging Face Hub dataset while it downloads: in the Hub's order, at one commit, resumable."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from trainers.config import SourceConfig
from trainers.data.pieces import normalise_newlines
from trainers.errors import DataError

ATTEMPTS = 6  # in a row, without one document in between
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 8.0
# Their exceptions derive from no common class; which of them is installed depends on the version of huggingface_hub.
HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp")

Position = dict[str, Any] | None  # JSON of constant size; None: before the first document


class Document(NamedTuple):
    text: str
    after: Position
    """where reading goes on behind this document"""


class HubText:
    """The text column of one split of a Hub dataset, read over the network as it is needed."""

    def __init__(self, source: SourceConfig, revision: str) -> None:
        """
        Args:
            source: `corpus` is hf:OWNER/NAME
            revision: the commit to read, from `resolve_revision`
        """
        self.source, self.revision = source, revision

    def documents(self, position: Position = None, stop: threading.Event | None = None) -> Iterator[Document]:
        """The documents behind `position` to the end of the split; ends early once `stop` is set.

        A lost connection is taken up again at the next document, up to 6 attempts with growing waits (15.5 s).
        Newlines are unified. Documents whose text is empty, null or holds a NUL are passed over: one such record among
        millions must not end a run that is under way.

        Raises:
            DataError: the dataset cannot be opened or read, or the connection stays away.
        """
        stop = stop or threading.Event()
        failures, dataset = 0, None
        while not stop.is_set():
            try:
                dataset = dataset or self._open()  # its own: a datasets.IterableDataset holds the state of one reader
                for document in self._read(dataset, position):
                    position, failures = document.after, 0
                    yield document
                    if stop.is_set():
                        return
                return
            except Exception as error:  # the libraries below raise any of a dozen unrelated classes
                failures += 1
                if isinstance(error, DataError) or not _may_pass(error) or failures == ATTEMPTS:
                    raise self._as_data_error(error, failures) from error
            stop.wait(min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (failures - 1)))

    def _read(self, dataset: Any, position: Position) -> Iterator[Document]:
        field = self.source.text_field
        dataset.load_state_dict(position)
        for example in dataset:
            text = example.get(field)
            if field not in example or not isinstance(text, str | None):
                raise DataError(
                    f"{self.source.corpus} has no text in the field {field!r}; its fields are "
                    f"{', '.join(example)}. Set text_field of this source to one that holds text."
                )
            if text and "\0" not in text:
                yield Document(normalise_newlines(text), dataset.state_dict())

    def _open(self) -> Any:
        source = self.source
        return _datasets().load_dataset(
            repository(source), name=source.subset, split=source.split, revision=self.revision, streaming=True
        )

    def _as_data_error(self, error: Exception, failures: int) -> DataError:
        if isinstance(error, DataError):
            return error
        reason = _reason(error)
        where = f"{self.source.corpus} (split {self.source.split}, commit {self.revision[:12]})"
        if _may_pass(error):
            return DataError(
                f"the connection to the Hugging Face Hub was lost while reading {where} and did not come back in "
                f"{failures} attempts: {reason}. Run the same command again when the network is back: it goes on."
            )
        return DataError(f"cannot read {where}: {reason}. Check corpus, subset, split and revision of this source.")


def open_text(source: SourceConfig, revision: str | None = None) -> HubText:
    """The text of hf:OWNER/NAME pinned to one commit: `revision`, or what `resolve_revision` says.

    Raises:
        DataError: the Hub does not know it or cannot be reached.
    """
    return HubText(source, revision or resolve_revision(source))


def resolve_revision(source: SourceConfig) -> str:
    """The full commit hash that `source.revision`, or the newest state of the dataset, stands for.

    Raises:
        DataError: no such dataset or revision, no permission, or the Hub cannot be reached.
    """
    hub, name = _huggingface_hub(), repository(source)
    try:
        commit = hub.HfApi().dataset_info(name, revision=source.revision).sha
    except Exception as error:  # see HTTP_LIBRARIES
        raise DataError(
            f"the Hugging Face Hub does not give {source.corpus}"
            + (f" at revision {source.revision}" if source.revision else "")
            + f": {_reason(error)}. Check the name, the network, and for a gated dataset "
            "log in with `hf auth login`."
        ) from error
    assert commit is not None
    return str(commit)


def repository(source: SourceConfig) -> str:
    """OWNER/NAME of hf:OWNER/NAME."""
    name = source.corpus.removeprefix("hf:")
    if name == source.corpus or not name.strip("/"):
        raise DataError(f"{source.corpus!r} names no Hub dataset: write corpus as hf:OWNER/NAME.")
    return name


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return bool(status == 429 or status >= 500)
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.split(".")[0] in HTTP_LIBRARIES


def _reason(error: Exception) -> str:
    if isinstance(error.__cause__, StopIteration):
        return "it holds no rows"  # what `datasets` makes of an empty file
    words = " ".join(str(error).split()) or "no further message"
    return f"{type(error).__name__}: {words[:300]}".rstrip(".")


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError("Hugging Face datasets need the package `datasets`: pip install datasets.") from error
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # it logs what it raises: a person gets one message, ours
    return datasets


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise DataError("Hugging Face datasets need the package `datasets`: pip install datasets.") from error
    return huggingface_hub
