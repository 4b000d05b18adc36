"""A Hub that answers wrongly when told to, and that can kill its client at a request."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from testing.hub_contents import File, Repo
from testing.hub_double import Hub, _Handler

Body = Callable[[bytes], bytes]
HTML = b"<!doctype html><html><body><h1>Sign in to the network</h1></body></html>"


@dataclass
class WrongAnswer:
    """Answers to requests that match are changed, so many `times` after `skip` of them.

    Attributes:
        method: of the request, as a regex.
        path: of it, as a regex.
        status: to answer with in place of the right one.
        body: makes the wrong body of the right one; None leaves it.
        headers: more of them; None takes one away.
        ignore_range: as if the request had asked for the whole file.
        cut: say the right length and stop after so large a share.
    """

    method: str
    path: str
    status: int | None = None
    body: Body | None = None
    headers: dict[str, str | None] = field(default_factory=dict)
    ignore_range: bool = False
    cut: float | None = None
    times: int = 10**9
    skip: int = 0

    def strikes(self, method: str, path: str) -> bool:
        if not re.fullmatch(self.method, method) or not re.search(self.path, path) or not self.times:
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class FaultyHub(Hub):
    """The double with `wrong` answers, and `kill_at`: the number of the request at which the client dies.

    Attributes:
        wrong: answers to change.
        kill_at: 1 for the first request from now; 0 for none.
        victim: file with the client's process id.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wrong: list[WrongAnswer] = []
        self.kill_at = 0
        self.victim: Path | None = None
        hub = self

        class Handler(_FaultyHandler):
            pass

        Handler.hub = hub
        self.server.RequestHandlerClass = Handler
        # Clients that die in the midst of a request are what this Hub is for.
        self.server.handle_error = lambda request, address: None

    def empty(self) -> None:
        """Forget everything."""
        with self.lock:
            self.repos.clear()
            self.objects.clear()
            self.requests.clear()
            self.stored.clear()
            self.tokens.clear()
            self.failures.clear()
            self.wrong.clear()
            self.kill_at = 0

    def put(self, id: str, folder: Path) -> str:
        """A repository with the files of a folder; its commit."""
        repo = Repo("model", id)
        tree = {
            path.relative_to(folder).as_posix(): File(path.read_bytes(), lfs=path.suffix in (".safetensors", ".bin"))
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        self.repos["model", id] = repo
        return repo.commit("main", tree, "put")

    def files(self, id: str) -> dict[str, bytes] | None:
        """What a repository's main branch holds."""
        repo = self.repos.get(("model", id))
        return None if repo is None else {path: file.data for path, file in repo.commits[repo.refs["main"]].items()}


class _FaultyHandler(_Handler):
    hub: FaultyHub
    answer: WrongAnswer | None = None

    def route(self) -> None:
        path = self.path.split("?")[0]
        with self.hub.lock:
            self.answer = next((wrong for wrong in self.hub.wrong if wrong.strikes(self.command, path)), None)
            self.hub.kill_at -= 1
            dies = self.hub.kill_at == 0
        if self.answer is not None and self.answer.ignore_range:
            del self.headers["Range"]
        if dies and self.hub.victim is not None:
            os.kill(int(self.hub.victim.read_text()), signal.SIGKILL)
        try:
            super().route()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        except (ValueError, KeyError, TypeError) as error:
            # A client that was answered with nonsense may ask for some.
            self.error(400, "BadRequest", f"{type(error).__name__}: {error}")
        if dies:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = route

    def reply(self, status: int, body: object = None, headers: dict[str, str] | None = None) -> None:
        wrong, self.answer = self.answer, None
        if wrong is None:
            super().reply(status, body, headers)
            return
        import json

        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        changed = wrong.body(data) if wrong.body is not None and data else data
        headers = {"Content-Type": "application/json", **(headers or {})}
        if changed != data and "Content-Length" in headers:
            headers["Content-Length"] = str(len(changed))
        for name, value in wrong.headers.items():
            headers.pop(name, None)
            if value is not None:
                headers[name] = value
        if wrong.status is not None:
            status = wrong.status
            if status == 204:
                changed = b""
                headers["Content-Length"] = "0"
        if wrong.cut is not None and self.command != "HEAD":
            headers["Content-Length"] = str(len(changed))
            changed = changed[: int(len(changed) * wrong.cut)]
            self.close_connection = True
        super().reply(status, changed, headers)
