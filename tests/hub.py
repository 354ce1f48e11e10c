"""A model hub of one process: as much of the Hugging Face API as downloading a model needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_hub(name: str, files: Path) -> Iterator[str]:
    """Serves the directory as repository ``name``, beside a gated ``made/gated``; yields the hub's address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _answer(self, with_body: bool) -> None:
            status, headers, body = _route(self.path.split("?")[0], name, files)
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _route(path: str, name: str, files: Path) -> tuple[int, dict[str, str], bytes]:
    if path.startswith("/api/models/made/gated"):
        return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."}, b"{}"
    if path in (f"/api/models/{name}", f"/api/models/{name}/revision/main"):
        return _json({"_id": "1", "id": name, "sha": COMMIT, "siblings": []})
    if path.startswith(f"/api/models/{name}/revision/"):
        return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
    if path == f"/api/models/{name}/tree/{COMMIT}":
        return _json([_entry(file, files) for file in sorted(files.iterdir())])
    prefix = f"/{name}/resolve/{COMMIT}/"
    if path.startswith(prefix) and (file := files / path.removeprefix(prefix)).is_file():
        return 200, {"ETag": f'"{_blob_id(file)}"', "X-Repo-Commit": COMMIT}, file.read_bytes()
    return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"


def _json(value: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _entry(file: Path, root: Path) -> dict[str, object]:
    return {
        "type": "file",
        "path": str(file.relative_to(root)),
        "size": file.stat().st_size,
        "oid": _blob_id(file),
    }


def _blob_id(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
