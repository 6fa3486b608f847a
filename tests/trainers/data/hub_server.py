"""A small server on 127.0.0.1 that speaks as much of the Hugging Face Hub's protocol as `datasets` needs.

With HF_ENDPOINT pointing at it, `load_dataset("OWNER/NAME", streaming=True)` reads the files given here, without the
internet. It keeps a log of what was asked for, and can fail on purpose.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import threading
from collections.abc import Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit


class HubServer:
    """`with HubServer({"owner/name": {"data/train-0.parquet": b"..."}}) as hub: ...`, then HF_ENDPOINT=hub.url."""

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]]) -> None:
        self.repositories = {name: dict(files) for name, files in repositories.items()}
        self.log: list[str] = []
        """"METHOD path" of each request, in order"""
        self._errors_left = 0
        self._cuts_left = 0
        self._only = ""
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, repository: str) -> str:
        """40 hex digits that change with the files."""
        digest = hashlib.sha1(repository.encode())
        for path, content in sorted(self.repositories[repository].items()):
            digest.update(path.encode() + content)
        return digest.hexdigest()

    def fail(self, times: int, only: str = "") -> None:
        """The next `times` downloads of a file whose path contains `only` answer HTTP 500."""
        self._errors_left, self._only = times, only

    def cut(self, times: int, only: str = "") -> None:
        """The next `times` downloads of a file whose path contains `only` break off in the middle."""
        self._cuts_left, self._only = times, only

    def downloads(self) -> list[str]:
        """Paths of the files whose content was asked for, in order."""
        return [
            line.split("/resolve/", 1)[1].split("/", 1)[1]
            for line in self.log
            if line.startswith("GET") and "/resolve/" in line
        ]

    def _take_fault(self, path: str) -> str | None:
        with self._lock:
            if self._only not in path:
                return None
            if self._errors_left:
                self._errors_left -= 1
                return "error"
            if self._cuts_left:
                self._cuts_left -= 1
                return "cut"
            return None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet: the delayed acknowledgement of two would cost 40 ms each
            disable_nagle_algorithm = True

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self._answer()

            def do_GET(self) -> None:
                self._answer()

            def do_POST(self) -> None:
                self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self._answer()

            def _answer(self) -> None:
                url = urlsplit(self.path)
                path = unquote(url.path)
                with hub._lock:
                    hub.log.append(f"{self.command} {path}")
                if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
                    self._repository(*found.groups())
                elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
                    recursive = parse_qs(url.query).get("recursive", ["false"])[0].lower() in ("true", "1")
                    self._tree(*found.groups(), recursive)
                elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/([^/]+)", path):
                    self._paths_info(*found.groups())
                elif found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                    self._file(*found.groups())
                else:
                    self._missing("EntryNotFound")

            def _known(self, name: str, revision: str | None) -> bool:
                if name not in hub.repositories:
                    self._missing("RepoNotFound")
                elif revision not in (None, "main", hub.commit(name)):
                    self._missing("RevisionNotFound")
                else:
                    return True
                return False

            def _repository(self, name: str, revision: str | None) -> None:
                if self._known(name, revision):
                    siblings = [{"rfilename": path} for path in sorted(hub.repositories[name])]
                    self._json({
                        "_id": "0", "id": name, "author": name.split("/")[0], "sha": hub.commit(name), "private": False,
                        "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [],
                        "lastModified": "2026-01-01T00:00:00.000Z", "siblings": siblings,
                    })  # fmt: skip

            def _tree(self, name: str, revision: str, folder: str | None, recursive: bool) -> None:
                if not self._known(name, revision):
                    return
                entries = [one for one in self._entries(name) if _inside(one["path"], folder or "", recursive)]
                if folder and not entries:
                    self._missing("EntryNotFound")
                else:
                    self._json(entries)

            def _paths_info(self, name: str, revision: str) -> None:
                if not self._known(name, revision):
                    return
                if "json" in self.headers.get("Content-Type", ""):
                    wanted = json.loads(self._body)["paths"]
                else:
                    wanted = parse_qs(self._body.decode())["paths"]
                wanted = [wanted] if isinstance(wanted, str) else wanted
                self._json([one for one in self._entries(name) if one["path"] in wanted])

            def _entries(self, name: str) -> list[dict[str, object]]:
                files = hub.repositories[name]
                folders = {str(one) for path in files for one in PurePosixPath(path).parents} - {"."}
                return [
                    {"type": "directory", "oid": _oid(folder.encode()), "size": 0, "path": folder}
                    for folder in sorted(folders)
                ] + [
                    {"type": "file", "oid": _oid(content), "size": len(content), "path": path}
                    for path, content in sorted(files.items())
                ]

            def _file(self, name: str, revision: str, path: str) -> None:
                if not self._known(name, revision):
                    return
                if path not in hub.repositories[name]:
                    self._missing("EntryNotFound", hub.commit(name))
                    return
                fault = hub._take_fault(path) if self.command == "GET" else None
                if fault == "error":
                    self._send(500, b"on purpose", {})
                    return
                content, status = hub.repositories[name][path], 200
                headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": hub.commit(name), "Accept-Ranges": "bytes"}
                if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                    first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
                    headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                    content, status = content[first : last + 1], 206
                self._send(status, content, headers, cut=fault == "cut")

            def _json(self, value: object) -> None:
                self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

            def _missing(self, code: str, commit: str = "") -> None:
                self._send(404, b"", {"X-Error-Code": code, "X-Error-Message": code, "X-Repo-Commit": commit})

            def _send(self, status: int, content: bytes, headers: dict[str, str], cut: bool = False) -> None:
                self.send_response(status)
                for key, value in headers.items():
                    if value:
                        self.send_header(key, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if cut:
                    self.wfile.write(content[: len(content) // 2])
                    self.close_connection = True
                elif self.command != "HEAD":
                    self.wfile.write(content)

        return Handler


def _inside(path: str, folder: str, recursive: bool) -> bool:
    if folder and not path.startswith(folder + "/"):
        return False
    return recursive or "/" not in path[len(folder) + 1 if folder else 0 :]


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def parquet(texts: Iterable[str], *, group: int = 50) -> bytes:
    """A Parquet file with the column `text`, `group` rows a row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    target = io.BytesIO()
    pq.write_table(pa.table({"text": list(texts)}), target, row_group_size=group)
    return target.getvalue()


def jsonl(texts: Iterable[str]) -> bytes:
    """One {"text": ...} a line."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
