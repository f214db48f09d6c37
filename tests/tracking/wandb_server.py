"""A wandb server as far as runs need one: it keeps what they send, on loopback."""

import contextlib
import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any


class Server(http.server.ThreadingHTTPServer):
    """Attributes: `history` and `events` (system metrics), each a list of rows as they came."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.history: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.ends: list[int] = []
        self.runs: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def summary(self) -> dict[str, Any]:
        """The last value of each name, as the server tells a run that resumes."""
        return {name: value for row in self.history for name, value in row.items()}


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self):
        self._answer({})

    do_GET = do_HEAD

    def do_PUT(self):
        self._body()
        self._answer({})

    def do_POST(self):
        body = self._body()
        if self.path == "/graphql":
            asked = json.loads(body)
            self._answer({"data": self._data(asked["query"], asked.get("variables") or {})})
        elif self.path.endswith("/file_stream"):
            self._keep(json.loads(body))
            self._answer({"limits": {}})
        else:
            self._answer({})

    def _keep(self, sent):
        for name, kept in (
            ("wandb-history.jsonl", self.server.history),
            ("wandb-events.jsonl", self.server.events),
        ):
            kept += map(json.loads, sent.get("files", {}).get(name, {}).get("content", []))
        if sent.get("complete"):
            self.server.ends.append(sent["exitcode"])

    def _data(self, query, variables):
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "us"}}
        bucket = {
            "id": "r", "name": variables.get("name"), "displayName": "run", "config": "{}",
            "project": project, "historyLineCount": len(self.server.history),
            "summaryMetrics": json.dumps(self.server.summary()), "historyTail": "[]",
            "eventsTail": "[]", "eventsLineCount": 0, "logLineCount": 0, "tags": [],
            "wandbConfig": json.dumps({"t": 1}),
        }  # fmt: skip
        if "RunResumeStatus" in query:
            known = variables["name"] in self.server.runs
            return {"model": {**project, "bucket": bucket if known else None}}
        if "UpsertBucket" in query:
            self.server.runs.add(variables["name"])
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "CreateRunFiles" in query:
            files = [
                {"name": name, "uploadUrl": f"{self.server.url}/file"}
                for name in variables["files"]
            ]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {"viewer": {"id": "u", "entity": "us", "username": "me", "flags": "{}"}}

    def _body(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def wandb_server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
