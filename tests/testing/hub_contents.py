"""What the Hub test double holds: files, repositories with their commits, and failures to come."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from urllib.parse import unquote


def git_blob_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class File:
    data: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        if not self.lfs:
            return git_blob_oid(self.data)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return git_blob_oid(pointer.encode())

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def entry(self, path: str) -> dict:
        info = {"type": "file", "path": path, "size": len(self.data), "oid": self.oid}
        if self.lfs:
            info["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": 134}
        return info


@dataclass
class Repo:
    kind: str
    id: str
    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    log: list[dict] = field(default_factory=list)

    def resolve(self, revision: str) -> str | None:
        revision = unquote(revision)
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def commit(self, branch: str, tree: dict[str, File], title: str) -> str:
        stamp = json.dumps([self.id, len(self.log), title, sorted((p, f.oid) for p, f in tree.items())])
        sha = hashlib.sha1(stamp.encode()).hexdigest()
        self.commits[sha] = tree
        self.refs[branch] = sha
        self.log.append({"oid": sha, "title": title, "branch": branch})
        return sha


@dataclass
class Failure:
    """Requests that match are answered with `status`, so many `times`, after `skip` of them went through."""

    method: str
    path: str
    status: int
    times: int
    skip: int
    body: object = None
    headers: dict[str, str] = field(default_factory=dict)

    def strikes(self, method: str, path: str) -> bool:
        if method != self.method or not re.search(self.path, path) or not self.times:
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True
