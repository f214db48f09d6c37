"""A small Hugging Face hub on loopback, which the real client libraries talk to.

Serves models and data sets, takes commits, and misbehaves as it is told. Endpoints as
`huggingface_hub` requests them; see its `hf_api.py`, `file_download.py` and `lfs.py`.
"""

import base64
import contextlib
import functools
import hashlib
import io
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import transformers.utils.hub

# Large files, which the hub keeps outside of git.
LFS = (".safetensors", ".bin", ".parquet", ".png")

TOKEN = "hf_canary3f9a1c"


README = b"""---
configs:
- config_name: mrpc
  data_files:
  - split: train
    path: mrpc/train-*
  - split: validation
    path: mrpc/validation-*
---
"""


def glue(train: Sequence[Any], validation: Sequence[Any]) -> dict[str, bytes]:
    """The files of a data set as GLUE has them on the hub, with rows of our own."""
    files = {"README.md": README}
    for split, rows in (("train", train), ("validation", validation)):
        written = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), written)
        files[f"mrpc/{split}-00000-of-00001.parquet"] = written.getvalue()
    return files


class Repository:
    """The commits of a repository, each as the contents of all its files, and its branches."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, bytes]] = {}
        self.refs: dict[str, str] = {}
        self.private = False

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Add files to a branch; return the commit."""
        before = self.commits.get(self.refs.get(branch, self.refs.get("main", "")), {})
        content = {**before, **files}
        digest = hashlib.sha1(str(len(self.commits)).encode())
        for path in sorted(content):
            digest.update(path.encode() + content[path])
        self.commits[digest.hexdigest()] = content
        self.refs[branch] = digest.hexdigest()
        return digest.hexdigest()

    def find(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class Hub:
    """The state of the server.

    Attributes:
        repositories: by kind and name, such as `models/some/bert`.
        requests: method, path and headers of each request, in order.
        fault: a regular expression for `METHOD path`, and what goes wrong with such requests:
            a status code, or silent, gone, short or corrupt.
        only_with_token: whether everything is answered 401 without `TOKEN`.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.objects: dict[str, bytes] = {}
        self.fault: tuple[str, int | str] | None = None
        self.only_with_token = False
        self.endpoint = ""

    def add(self, name: str, source: Path | Mapping[str, bytes], branch: str = "main") -> str:
        """Commit the files of a folder to `models/...` or `datasets/...`; return the commit."""
        if isinstance(source, Path):
            source = {
                str(path.relative_to(source)): path.read_bytes()
                for path in source.rglob("*")
                if path.is_file()
            }
        return self.repositories.setdefault(name, Repository()).commit(source, branch)

    def reset(self) -> None:
        """Forget all repositories, requests and faults."""
        self.repositories.clear()
        self.objects.clear()
        self.requests.clear()
        self.fault, self.only_with_token = None, False

    def use(self, monkeypatch: Any, home: Path) -> None:
        """Let this process use this hub, with a token, and no other cache than `home`."""
        for name, value in self.environment(home).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for constants in (huggingface_hub.constants, datasets.config):
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", self.endpoint)
        # Which keeps the address that it was made with.
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(
            huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.endpoint + template
        )
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", self.endpoint)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")

    def environment(self, home: Path) -> dict[str, str]:
        """Environment of a process that uses this hub, and no other cache than `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_DATASETS_CACHE": str(home / "datasets"),
            "HF_HUB_OFFLINE": "0",
            "no_proxy": "127.0.0.1",
        }


@functools.cache
def start_hub() -> Hub:
    """Start the hub of this process on a free port; the libraries keep the address of the first."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return hub


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        hub = self.hub
        self.fault: int | str | None = None
        address = urllib.parse.urlsplit(self.path)
        self.query = urllib.parse.parse_qs(address.query)
        path = urllib.parse.unquote(address.path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.requests.append((self.command, path, dict(self.headers)))
        if hub.fault and re.search(hub.fault[0], f"{self.command} {path}"):
            self.fault = hub.fault[1]
        if self.fault == "silent":
            time.sleep(30)
            self.close_connection = True
        elif self.fault == "gone" and not self._streams(path):
            self.close_connection = True
        elif isinstance(self.fault, int):
            self._error(self.fault)
        elif hub.only_with_token and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._error(401)
        else:
            self._route(path)

    do_HEAD = do_POST = do_PUT = do_GET

    def _streams(self, path: str) -> bool:
        return self.command == "GET" and "/resolve/" in path

    def _route(self, path: str) -> None:
        repository = r"(?P<name>[^/]+/[^/]+)"
        api = rf"/api/(?P<kind>models|datasets)/{repository}"
        routes = {
            rf"{api}(/revision/(?P<revision>.+))?": self._info,
            rf"{api}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?": self._tree,
            rf"{api}/paths-info/(?P<revision>[^/]+)": self._paths_info,
            rf"{api}/preupload/(?P<revision>.+)": self._preupload,
            rf"{api}/commit/(?P<revision>.+)": self._commit,
            rf"{api}/branch/(?P<branch>.+)": self._branch,
            rf"/((?P<kind>datasets)/)?{repository}/resolve/(?P<revision>[^/]+)/(?P<file>.+)": (
                self._resolve
            ),
            rf"/{repository}\.git/info/lfs/objects/batch": self._batch,
            r"/lfs/(?P<oid>\w+)": self._put_object,
            r"/api/repos/create": self._create,
            r"/api/validate-yaml": lambda: self._json({"errors": [], "warnings": []}),
            r"/api/whoami-v2": lambda: self._json({"name": "me", "type": "user", "orgs": []}),
        }
        for pattern, answer in routes.items():
            if found := re.fullmatch(pattern, path):
                arguments = found.groupdict()
                if "kind" in arguments:
                    full_name = f"{arguments.pop('kind') or 'models'}/{arguments.pop('name')}"
                    arguments["repository"] = self.hub.repositories.get(full_name)
                    arguments["full_name"] = full_name
                    if arguments["repository"] is None:
                        return self._error(404, "RepoNotFound")
                if "revision" in arguments:
                    revision = arguments.pop("revision") or "main"
                    commit = arguments["repository"].find(revision)
                    if commit is None and self.command != "POST":
                        return self._error(404, "RevisionNotFound")
                    arguments["commit"] = commit
                    if self.command == "POST":
                        arguments["revision"] = revision
                return answer(**arguments)
        return self._error(404)

    # ------------------------------------------------------------------------- answers

    def _send(self, body: bytes, headers: Mapping[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault in ("gone", "short"):
            # The rest never comes; a "short" file is one whose server thinks it complete.
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif self.fault == "stalled":
            self.wfile.write(body[: len(body) // 2])
            time.sleep(30)
            self.close_connection = True
        elif self.fault == "corrupt":
            self.wfile.write(body[:-1] + bytes([body[-1] ^ 1]))
        else:
            self.wfile.write(body)

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(json.dumps(content).encode(), {"Content-Type": "application/json"}, status)

    def _error(self, status: int, code: str = "") -> None:
        headers = {"Content-Type": "application/json"}
        if code:
            headers |= {"X-Error-Code": code, "X-Error-Message": code}
        if status == 429:
            headers |= {"ratelimit": '"api";r=0;t=280', "Retry-After": "280"}
        body = json.dumps({"error": f"error {status}"}).encode()
        # Not through `_send`: the error itself arrives whole.
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _info(self, repository: Repository, full_name: str, commit: str, **_: Any) -> None:
        files = repository.commits.get(commit, {})
        name = full_name.partition("/")[2]
        info = {"id": name, "modelId": name, "sha": commit, "private": repository.private}
        info |= {"siblings": [{"rfilename": path} for path in files], "tags": []}
        self._json(info)

    def _tree(
        self, repository: Repository, commit: str, folder: str | None, full_name: str
    ) -> None:
        del full_name
        files = repository.commits[commit]
        prefix = f"{folder}/" if folder else ""
        inside = {path: content for path, content in files.items() if path.startswith(prefix)}
        if folder and not inside:
            return self._error(404, "EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        folders = {
            prefix + "/".join(parts[:depth])
            for path in inside
            for parts in [path.removeprefix(prefix).split("/")]
            for depth in range(1, len(parts))
        }
        if not recursive:
            inside = {path: inside[path] for path in inside if "/" not in path[len(prefix) :]}
            folders = {path for path in folders if "/" not in path[len(prefix) :]}
        entries = [_file_entry(path, content) for path, content in inside.items()]
        entries += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
                    for path in folders]  # fmt: skip
        return self._json(entries)

    def _paths_info(self, repository: Repository, commit: str | None, **_: Any) -> None:
        if commit is None:
            return self._error(404, "RevisionNotFound")
        files = repository.commits[commit]
        paths = urllib.parse.parse_qs(self.body.decode()).get("paths", [])
        found = [_file_entry(path, files[path]) for path in paths if path in files]
        found += [
            {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
            for path in paths
            if path not in files and any(name.startswith(f"{path}/") for name in files)
        ]
        return self._json(found)

    def _resolve(self, repository: Repository, commit: str, file: str, full_name: str) -> None:
        del full_name
        content = repository.commits[commit].get(file)
        headers = {"X-Repo-Commit": commit}
        if content is None:
            headers |= {"X-Error-Code": "EntryNotFound"}
            return self._send(b"", headers, 404)
        headers["ETag"] = f'"{_etag(file, content)}"'
        if self.fault == "short":
            content = content[: len(content) // 2]
            self.fault = None
        return self._send(content, headers)

    # -------------------------------------------------------------------------- pushes

    def _create(self) -> None:
        wanted = json.loads(self.body)
        name = f"models/{wanted['organization'] or 'me'}/{wanted['name']}"
        if name in self.hub.repositories:
            return self._json({"url": f"{self.hub.endpoint}/{name.partition('/')[2]}"}, 409)
        repository = self.hub.repositories[name] = Repository()
        repository.private = wanted.get("visibility") == "private"
        repository.commit({".gitattributes": b""})
        return self._json({"url": f"{self.hub.endpoint}/{name.partition('/')[2]}"})

    def _branch(self, repository: Repository, branch: str, full_name: str) -> None:
        del full_name
        if branch in repository.refs:
            return self._error(409)
        repository.refs[branch] = repository.refs["main"]
        return self._json({})

    def _preupload(
        self, repository: Repository, commit: str | None, revision: str, full_name: str
    ) -> None:
        del full_name, revision
        if commit is None:
            return self._error(404, "RevisionNotFound")
        there = repository.commits[commit]
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular",
                "shouldIgnore": False,
                "oid": _etag(file["path"], there[file["path"]]) if file["path"] in there else None,
            }
            for file in json.loads(self.body)["files"]
        ]
        return self._json({"files": files})

    def _batch(self, name: str) -> None:
        del name
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}
                entry["actions"] = {"upload": upload}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def _put_object(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400)
        self.hub.objects[oid] = self.body
        return self._json({})

    def _commit(
        self, repository: Repository, commit: str | None, revision: str, full_name: str
    ) -> None:
        if commit is None:
            return self._error(404, "RevisionNotFound")
        files = {}
        for line in self.body.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "lfsFile":
                files[item["value"]["path"]] = self.hub.objects[item["value"]["oid"]]
        creates_pr = "create_pr" in self.query
        oid = repository.commit(files, "refs/pr/1" if creates_pr else revision)
        address = f"{self.hub.endpoint}/{full_name.partition('/')[2]}"
        answer = {"commitUrl": f"{address}/commit/{oid}", "commitOid": oid, "success": True}
        answer["pullRequestUrl"] = f"{address}/discussions/1" if creates_pr else None
        return self._json(answer)


def _etag(path: str, content: bytes) -> str:
    """The name of a file's content: SHA-256 for large files, git's SHA-1 for the others."""
    if path.endswith(LFS):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _file_entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if path.endswith(LFS):
        entry["lfs"] = {"oid": _etag(path, content), "size": len(content), "pointerSize": 134}
    return entry
