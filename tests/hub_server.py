"""A Hub on localhost: models by revision, over the endpoints that ``huggingface_hub`` asks.

By hand: ``python tests/hub_server.py acme/student=FOLDER ...`` prints its address and serves.
"""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_INFO = re.compile(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?")
_TREE = re.compile(r"/api/models/([^/]+/[^/]+)/tree/([^/?]+)")


@dataclasses.dataclass
class FakeHub:
    """Models of a Hub.

    Attributes:
      url: its address.
      commits: by (repo, commit) the files of it.
      heads: by (repo, branch) the commit.
      refuses: by repo (status, X-Error-Code) of all answers.
      asked: paths of all requests.
    """

    url: str = ""
    commits: dict[tuple[str, str], dict[str, bytes]] = dataclasses.field(default_factory=dict)
    heads: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    refuses: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    asked: list[str] = dataclasses.field(default_factory=list)

    def push(self, repo: str, folder: Path, branch: str = "main", **more: bytes) -> str:
        """Make the files of a folder, and more, the newest of a model; returns the commit."""
        files = {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.is_file()}
        files |= {name.replace("__", "."): data for name, data in more.items()}
        digest = hashlib.sha1(repo.encode())
        for name, data in sorted(files.items()):
            digest.update(name.encode() + data)
        commit = digest.hexdigest()
        self.commits[repo, commit] = files
        self.heads[repo, branch] = commit
        return commit

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a path."""
        self.asked.append(path)
        if found := _RESOLVE.fullmatch(path):
            kind, (repo, revision, name) = "file", found.groups()
        elif found := _TREE.fullmatch(path):
            kind, (repo, revision), name = "tree", found.groups(), ""
        elif found := _INFO.fullmatch(path):
            kind, (repo, revision), name = "info", found.groups(), ""
        else:
            return 404, {}, b""
        if repo in self.refuses:
            status, code = self.refuses[repo]
            return status, {"X-Error-Code": code, "X-Error-Message": code} if code else {}, b""
        if not any(repo == known for known, _ in self.heads):
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        commit = self.heads.get((repo, revision or "main"), revision or "")
        if (repo, commit) not in self.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = self.commits[repo, commit]
        if kind == "info":
            told = {"id": repo, "sha": commit, "siblings": [{"rfilename": n} for n in files]}
            return 200, {"Content-Type": "application/json"}, json.dumps(told).encode()
        if kind == "tree":
            rows = [
                {
                    "type": "file",
                    "path": n,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                for n, data in files.items()
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(rows).encode()
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
        return 200, {"ETag": etag, "X-Repo-Commit": commit}, files[name]

    @property
    def fetched(self) -> set[str]:
        """Names of the files that were asked for."""
        return {found[3] for path in self.asked if (found := _RESOLVE.fullmatch(path))}


@contextlib.contextmanager
def serving() -> Iterator[FakeHub]:
    """A Hub without models, on a free port."""
    hub = FakeHub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
            status, headers, body = hub.answer(path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()


def use(patch: pytest.MonkeyPatch, url: str, cache: Path, *, is_offline: bool = False) -> None:
    """Let ``huggingface_hub``, which reads its variables on import, ask a Hub."""
    constants = huggingface_hub.constants
    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", is_offline)


if __name__ == "__main__":
    with serving() as hub:
        for given in sys.argv[1:]:
            repo, _, folder = given.partition("=")
            print(repo, hub.push(repo, Path(folder)))
        print(hub.url, flush=True)
        sys.stdin.read()
