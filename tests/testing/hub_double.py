"""A Hugging Face Hub test double: the standard library only, loopback only, all state in memory.

Speaks the part of the Hub's HTTP API that `huggingface_hub` uses for create_repo, upload (LFS, not Xet),
create_commit / upload_folder, model_info, list_repo_tree, paths-info, refs, branches and tags, and for
hf_hub_download / snapshot_download. Clients need HF_ENDPOINT=<Hub.url>, HF_HUB_DISABLE_XET=1 and any HF_TOKEN.

`Hub.fail` makes coming requests fail; `Hub.requests` and `Hub.stored` say what was asked for and what was sent.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from testing.hub_contents import Failure, File, Repo

TEXT_SUFFIXES = (".json", ".md", ".py", ".txt", ".jinja", ".gitattributes", ".toml", ".yaml", ".yml", ".model.json")


class Hub:
    """`with Hub() as hub:` serves an empty Hub at `hub.url` until the block ends.

    Attributes:
        repos: what was created, by kind and id.
        objects: LFS objects by sha256.
        requests: `METHOD path` of every request, in order.
        stored: sha256 of every LFS object that was sent, in order.
        tokens: the `Authorization` header of every request.
        members_only: organisations in which nobody may create or write.
        served: what a proxy makes of a file's bytes on their way, by path; what the tree says of it stays.
        ignores_ranges: answer range requests with the whole file.
    """

    def __init__(self, port: int = 0, user: str = "tester") -> None:
        self.user = user
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.stored: list[str] = []
        self.tokens: list[str | None] = []
        self.members_only: set[str] = set()
        self.failures: list[Failure] = []
        self.served: dict[str, Callable[[bytes], bytes]] = {}
        self.ignores_ranges = False
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def fail(self, method: str, path: str, *, status: int = 400, times: int = 1, skip: int = 0) -> None:
        """Answer the next `times` requests whose path matches the regex with `status`, after letting `skip` pass."""
        self.failures.append(Failure(method, path, status, times, skip))

    def answer(
        self,
        method: str,
        path: str,
        *,
        status: int = 200,
        body: object = b"",
        content_type: str = "application/json",
        times: int = 1,
        skip: int = 0,
        **headers: str,
    ) -> None:
        """Answer as `fail` does, with a body and headers (underscores for hyphens) of one's own: what a proxy says."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.failures.append(Failure(method, path, status, times, skip, body, {"Content-Type": content_type, **named}))

    def put(self, folder: Path, id: str = "tester/base", branch: str = "main") -> str:
        """Commit a folder's files without a client; returns the commit."""
        repo = self.repos.setdefault(("model", id), Repo("model", id))
        tree = {
            path.relative_to(folder).as_posix(): File(path.read_bytes(), lfs=path.suffix == ".safetensors")
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        return repo.commit(branch, tree, "put")

    def tree(self, id: str, revision: str = "main") -> dict[str, bytes]:
        """The content of all files of a revision."""
        repo = self.repos["model", id]
        return {path: file.data for path, file in repo.commits[repo.refs[revision]].items()}

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    # ------------------------------------------------------------------ plumbing
    def reply(self, status: int, body: object = None, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", **(headers or {})}
        headers.setdefault("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def error(self, status: int, code: str, message: str) -> None:
        self.reply(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def route(self) -> None:
        url = urlsplit(self.path)
        path, query = url.path, parse_qs(url.query)
        raw = self.body()
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            self.hub.tokens.append(self.headers.get("Authorization"))
            for failure in self.hub.failures:
                if failure.strikes(self.command, path):
                    if failure.body is not None:
                        self.reply(failure.status, failure.body, failure.headers)
                        return
                    self.error(failure.status, "TestFailure", "the test asked for this failure")
                    return
            for methods, pattern, handler in _ROUTES:
                if self.command in methods and (match := re.fullmatch(pattern, path)):
                    handler(self, raw, query, **{k: unquote(v) if v else v for k, v in match.groupdict().items()})
                    return
        self.error(404, "NotImplemented", f"the test double has no {self.command} {path}")

    def may_write(self, id: str) -> bool:
        """Whether the request may write to this repository; answers it when not."""
        if not self.headers.get("Authorization"):
            self.error(401, "Unauthorized", "Invalid username or password.")
            return False
        if id.split("/")[0] in self.hub.members_only:
            self.error(403, "Forbidden", f"You don't have the rights to write under {id}")
            return False
        return True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = route

    def repo(self, kind: str, id: str) -> Repo | None:
        repo = self.hub.repos.get((kind, id))
        if repo is None:
            self.error(404, "RepoNotFound", "Repository not found")
        return repo

    def tree(self, repo: Repo, revision: str) -> tuple[str, dict[str, File]] | None:
        sha = repo.resolve(revision)
        if sha is None:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return sha, repo.commits[sha]

    # ------------------------------------------------------------------ endpoints
    def whoami(self, raw, query):
        if not self.headers.get("Authorization"):
            self.error(401, "Unauthorized", "Invalid username or password.")
            return
        self.reply(
            200, {"type": "user", "name": self.hub.user, "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        )

    def validate_yaml(self, raw, query):
        self.reply(200, {"errors": [], "warnings": []})

    def create(self, raw, query):
        want = json.loads(raw)
        kind = want.get("type") or "model"
        id = f"{want.get('organization') or self.hub.user}/{want['name']}"
        if not self.may_write(id):
            return
        prefix = "" if kind == "model" else f"{kind}s/"
        answer = {"url": f"{self.hub.url}/{prefix}{id}", "name": id}
        if (kind, id) in self.hub.repos:
            self.reply(409, {"error": "You already created this repo", **answer})
            return
        repo = Repo(kind, id, private=want.get("visibility") == "private" or bool(want.get("private")))
        repo.commit(
            "main", {".gitattributes": File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")}, "initial commit"
        )
        self.hub.repos[kind, id] = repo
        self.reply(200, answer)

    def delete(self, raw, query):
        want = json.loads(raw)
        id = f"{want.get('organization') or self.hub.user}/{want['name']}"
        gone = self.hub.repos.pop((want.get("type") or "model", id), None)
        self.reply(200, {}) if gone else self.error(404, "RepoNotFound", "Repository not found")

    def info(self, raw, query, kind, id, revision=None):
        if (repo := self.repo(kind, id)) and (found := self.tree(repo, revision or "main")):
            sha, tree = found
            self.reply(
                200,
                {
                    "_id": id,
                    "id": id,
                    "modelId": id,
                    "author": id.split("/")[0],
                    "sha": sha,
                    "private": repo.private,
                    "disabled": False,
                    "gated": False,
                    "tags": [],
                    "downloads": 0,
                    "likes": 0,
                    "lastModified": "2026-01-01T00:00:00.000Z",
                    "createdAt": "2026-01-01T00:00:00.000Z",
                    "siblings": [
                        {"rfilename": p, **({"size": len(f.data), "blobId": f.oid} if "blobs" in query else {})}
                        for p, f in tree.items()
                    ],
                },
            )

    def list_tree(self, raw, query, kind, id, revision, path=None):
        if (repo := self.repo(kind, id)) and (found := self.tree(repo, revision)):
            prefix = f"{path}/" if path else ""
            rows, folders = [], set()
            for name, file in sorted(found[1].items()):
                if not name.startswith(prefix):
                    continue
                parts = name[len(prefix) :].split("/")
                for depth in range(1, len(parts)):
                    folder = prefix + "/".join(parts[:depth])
                    if folder not in folders and (
                        depth == 1 or query.get("recursive", ["false"])[0].lower() == "true"
                    ):
                        folders.add(folder)
                        rows.append(
                            {
                                "type": "directory",
                                "path": folder,
                                "oid": hashlib.sha1(folder.encode()).hexdigest(),
                                "size": 0,
                            }
                        )
                if len(parts) == 1 or query.get("recursive", ["false"])[0].lower() == "true":
                    rows.append(file.entry(name))
            if prefix and not rows:
                self.error(404, "EntryNotFound", f"{path} does not exist on {revision}")
                return
            self.reply(200, rows)

    def paths_info(self, raw, query, kind, id, revision):
        if (repo := self.repo(kind, id)) and (found := self.tree(repo, revision)):
            ctype = self.headers.get("Content-Type", "")
            paths = json.loads(raw)["paths"] if "json" in ctype else parse_qs(raw.decode()).get("paths", [])
            self.reply(200, [found[1][p].entry(p) for p in paths if p in found[1]])

    def list_refs(self, raw, query, kind, id):
        if repo := self.repo(kind, id):
            row = lambda n, r: {"name": n, "ref": r, "targetCommit": repo.refs[n]}
            tags = [n for n in repo.refs if n.startswith("refs/tags/")]
            self.reply(
                200,
                {
                    "branches": [row(n, f"refs/heads/{n}") for n in repo.refs if n not in tags],
                    "converts": [],
                    "tags": [
                        {"name": n.removeprefix("refs/tags/"), "ref": n, "targetCommit": repo.refs[n]} for n in tags
                    ],
                },
            )

    def branch(self, raw, query, kind, id, name):
        if repo := self.repo(kind, id):
            if name in repo.refs:
                self.error(409, "BranchExists", "branch already exists")
                return
            start = (json.loads(raw or b"{}") or {}).get("startingPoint", "main")
            repo.refs[name] = repo.resolve(start) or repo.refs["main"]
            self.reply(200, {})

    def tag(self, raw, query, kind, id, revision):
        if repo := self.repo(kind, id):
            want = json.loads(raw)
            sha = repo.resolve(revision)
            repo.refs[want["tag"]] = sha
            self.reply(200, {})

    def commits(self, raw, query, kind, id, revision):
        if repo := self.repo(kind, id):
            self.reply(
                200,
                [
                    {
                        "id": c["oid"],
                        "title": c["title"],
                        "message": "",
                        "date": "2026-01-01T00:00:00.000Z",
                        "authors": [{"user": self.hub.user}],
                    }
                    for c in reversed(repo.log)
                ],
            )

    def preupload(self, raw, query, kind, id, revision):
        if repo := self.repo(kind, id):
            sha = repo.resolve(revision) or repo.refs["main"]
            files = []
            for file in json.loads(raw)["files"]:
                sample = base64.b64decode(file["sample"])
                text = file["path"].endswith(TEXT_SUFFIXES) and file["size"] < 10 * 2**20 and b"\0" not in sample
                known = repo.commits[sha].get(file["path"])
                files.append(
                    {
                        "path": file["path"],
                        "uploadMode": "regular" if text else "lfs",
                        "shouldIgnore": False,
                        "oid": known.etag if known else None,
                    }
                )
            self.reply(200, {"files": files})

    def lfs_batch(self, raw, query, id):
        objects = []
        for item in json.loads(raw)["objects"]:
            row = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                row["actions"] = {
                    "upload": {"href": f"{self.hub.url}/_lfs/{item['oid']}"},
                    "verify": {"href": f"{self.hub.url}/_lfs/{item['oid']}/verify"},
                }
            objects.append(row)
        self.reply(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_put(self, raw, query, oid):
        if hashlib.sha256(raw).hexdigest() != oid:
            self.error(422, "BadOid", "sha256 mismatch")
            return
        self.hub.objects[oid] = raw
        self.hub.stored.append(oid)
        self.reply(200, b"", {"ETag": f'"{oid}"'})

    def lfs_verify(self, raw, query, oid):
        ok = len(self.hub.objects.get(oid, b"")) == json.loads(raw)["size"]
        self.reply(200, {}) if ok else self.error(404, "NotUploaded", "object missing")

    def do_commit(self, raw, query, kind, id, revision):
        if not self.may_write(id) or not (repo := self.repo(kind, id)):
            return
        if not (sha := repo.resolve(revision)):
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        tree, title = dict(repo.commits[sha]), ""
        for line in raw.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, sha):
                    self.error(412, "ParentMismatch", "A commit has happened since. Please refresh and try again.")
                    return
            elif key == "file":
                tree[value["path"]] = File(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    self.error(
                        400, "LfsMissing", f"LFS pointer pointed to a file that does not exist: {value['path']}"
                    )
                    return
                tree[value["path"]] = File(self.hub.objects[value["oid"]], lfs=True)
            elif key == "deletedFile":
                tree.pop(value["path"], None)
            elif key == "deletedFolder":
                tree = {p: f for p, f in tree.items() if not p.startswith(value["path"].rstrip("/") + "/")}
        prefix = "" if kind == "model" else f"{kind}s/"
        answer = {}
        if "create_pr" in query:
            number = sum(r.startswith("refs/pr/") for r in repo.refs) + 1
            new = repo.commit(f"refs/pr/{number}", tree, title)
            answer["pullRequestUrl"] = f"{self.hub.url}/{prefix}{id}/discussions/{number}"
        else:
            new = repo.commit(revision, tree, title)
        self.reply(
            200,
            {"success": True, "commitOid": new, "commitUrl": f"{self.hub.url}/{prefix}{id}/commit/{new}", **answer},
        )

    def resolve(self, raw, query, kind, id, revision, path):
        kind = (kind or "models/").rstrip("/").removesuffix("s")
        if (repo := self.repo(kind, id)) and (found := self.tree(repo, revision)):
            sha, tree = found
            headers = {"X-Repo-Commit": sha}
            if (file := tree.get(path)) is None:
                self.reply(
                    404,
                    {"error": "Entry not found"},
                    {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"},
                )
                return
            headers |= {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
            if file.lfs:
                headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data))}
            data = self.hub.served.get(path, bytes)(file.data)
            span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if span and self.command == "GET" and not self.hub.ignores_ranges:
                start, stop = int(span[1]), int(span[2] or len(file.data) - 1) + 1
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(file.data)}"
                self.reply(206, data[start:stop], headers)
                return
            headers["Content-Length"] = str(len(data))
            self.reply(200, data, headers)


_KIND = r"/api/(?P<kind>model|dataset|space|kernel)s/(?P<id>[^/]+/[^/]+)"
_ROUTES = [
    (("GET",), r"/api/whoami-v2", _Handler.whoami),
    (("POST",), r"/api/validate-yaml", _Handler.validate_yaml),
    (("POST",), r"/api/repos/create", _Handler.create),
    (("DELETE",), r"/api/repos/delete", _Handler.delete),
    (("GET",), _KIND, _Handler.info),
    (("GET",), _KIND + r"/revision/(?P<revision>[^/]+)", _Handler.info),
    (("GET",), _KIND + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", _Handler.list_tree),
    (("POST",), _KIND + r"/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    (("GET",), _KIND + r"/refs", _Handler.list_refs),
    (("GET",), _KIND + r"/commits/(?P<revision>[^/]+)", _Handler.commits),
    (("POST",), _KIND + r"/branch/(?P<name>[^/]+)", _Handler.branch),
    (("POST",), _KIND + r"/tag/(?P<revision>[^/]+)", _Handler.tag),
    (("POST",), _KIND + r"/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (("POST",), _KIND + r"/commit/(?P<revision>[^/]+)", _Handler.do_commit),
    (
        ("POST",),
        r"/(?:(?:datasets|spaces|kernels)/)?(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch",
        _Handler.lfs_batch,
    ),
    (("PUT",), r"/_lfs/(?P<oid>[0-9a-f]{64})", _Handler.lfs_put),
    (("POST",), r"/_lfs/(?P<oid>[0-9a-f]{64})/verify", _Handler.lfs_verify),
    (
        ("GET", "HEAD"),
        r"/(?P<kind>(?:datasets|spaces|kernels)/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
        _Handler.resolve,
    ),
]


if __name__ == "__main__":
    import sys

    hub = Hub(port=int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    print(hub.url, flush=True)
    hub.server.serve_forever()
