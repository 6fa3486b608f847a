"""follow: a job's output as it comes, and how the job ended."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.errors import SubmissionError
from cluster.submit import Cluster

LOOK_S = 5.0
"""how often the job's state is asked for while its output is followed"""
LAST_WORDS_S = 15.0
"""for the output to end by itself once the job has"""
PATIENCE_S = 120.0
"""with a cluster that does not answer"""


@dataclass(frozen=True)
class Ending:
    """How a job ended."""

    status: str
    """SUCCEEDED, FAILED or STOPPED"""
    exit_code: int | None
    """the command's own, 128 + n where signal n ended it; None where Ray does not know it"""
    message: str


def follow(
    cluster: Cluster, submission_id: str, write: Callable[[str], object], note: Callable[[str], object]
) -> Ending:
    """Hand the job's output to `write` as it comes, each character once, until the job has ended.

    A connection that breaks is made again. Raises SubmissionError for an unknown job, and when the cluster has not
    answered for PATIENCE_S.
    """
    info = cluster.info(submission_id)
    output = Output(write)
    while not info.status.is_terminal():
        with contextlib.suppress(ConnectionAbortedError):
            asyncio.run(_watch(cluster, submission_id, output, note))
        info = _patiently(cluster, submission_id)
        if not info.status.is_terminal():
            time.sleep(1.0)
    output.complete(cluster.log(submission_id))
    return ending(info)


class Output:
    """What has been shown already: a connection made anew begins at the first character."""

    def __init__(self, write: Callable[[str], object]):
        self._write = write
        self.shown = 0
        self._position = 0

    def rewind(self) -> None:
        self._position = 0

    def add(self, text: str) -> None:
        """The next piece of a connection; shown as far as it is new."""
        start = max(0, self.shown - self._position)
        self._position += len(text)
        if start < len(text):
            self._write(text[start:])
            self.shown = self._position

    def complete(self, log: str) -> None:
        """The whole, in the end."""
        self.rewind()
        self.add(log)


async def _watch(cluster: Cluster, submission_id: str, output: Output, note: Callable[[str], object]) -> None:
    """Follow one connection until it ends or the job's state says that it should have."""
    following = asyncio.create_task(_tail(cluster, submission_id, output))
    looking = asyncio.create_task(_look(cluster, submission_id, note))
    done, pending = await asyncio.wait({following, looking}, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for task in done:
        task.result()


async def _tail(cluster: Cluster, submission_id: str, output: Output) -> None:
    """Raises ConnectionAbortedError when the connection breaks."""
    import aiohttp

    output.rewind()
    pieces = cluster.client.tail_job_logs(submission_id)
    while True:
        try:
            piece = await anext(pieces)
        except StopAsyncIteration:
            return
        except (aiohttp.ClientError, RuntimeError, OSError) as error:
            raise ConnectionAbortedError(str(error)) from error
        output.add(piece)


async def _look(cluster: Cluster, submission_id: str, note: Callable[[str], object]) -> None:
    """Return when the job has been over for a while; say once what a job waits for that does not start."""
    waiting = ""
    while True:
        await asyncio.sleep(LOOK_S)
        try:
            info = await asyncio.to_thread(cluster.info, submission_id)
        except SubmissionError:
            return  # `follow` asks again, where Ctrl-C is heard at once
        if info.status.is_terminal():
            await asyncio.sleep(LAST_WORDS_S)
            return
        if info.status == "PENDING" and info.message and info.message != waiting:
            waiting = info.message
            note(f"the job waits: {waiting}")


def _patiently(cluster: Cluster, submission_id: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return cluster.info(submission_id)
        except SubmissionError as error:
            if time.monotonic() > deadline:
                raise SubmissionError(f"the job was lost sight of, and may be running still: {error}") from None
            time.sleep(2.0)


def ending(info: Any) -> Ending:
    """What JobDetails says of a job that is over."""
    code = info.driver_exit_code
    if code is None and info.status == "SUCCEEDED":
        code = 0  # by definition
    if code is not None and code < 0:
        code = 128 - code
    return Ending(str(info.status.value), code, info.message or "")
