"""What runs tries: a fork server, a Hub, templates, and sandboxes that are gone afterwards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faulty_hub import FaultyHub

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# What a symlink may point to, and what the Hub is shown: neither may ever be written or printed.
SECRET = "a secret from outside the checkpoint"
HUB_TOKEN = "hf_hostileTokenThatNobodyMaySee"
SECONDS, MEMORY = 600.0, 3 * 2**29


@dataclass(frozen=True)
class Run:
    """How a verb ended, and what it said."""

    code: int | None
    signal: int | None
    late: bool
    greedy: bool
    memory: int
    cpu: float
    wall: float
    out: str
    err: str
    argv: tuple[str, ...] = field(default=())


class Workshop:
    """Everything that tries share. A context manager.

    Args:
        folder: for templates, sandboxes and what the Hub's client keeps; emptied by nobody else.
        seconds: after which a try counts as hung.
        memory: bytes beyond the server's own after which it counts as greedy.
    """

    def __init__(self, folder: Path, seconds: float = SECONDS, memory: int = MEMORY) -> None:
        self.folder, self.seconds, self.memory = folder, seconds, memory
        self.hub = FaultyHub()
        #: What undisturbed runs gave, by scenario.
        self.known: dict[str, Any] = {}

    def __enter__(self) -> Workshop:
        self.hub.__enter__()
        self.folder.mkdir(parents=True, exist_ok=True)
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "PYTHON", "COV_", "PYTEST"))
        }
        environment = {
            **inherited,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path and path != str(HERE)),
            "PYTHONWARNINGS": "ignore",
            "HF_ENDPOINT": self.hub.url,
            "HF_TOKEN": HUB_TOKEN,
            "HF_HOME": str(self.folder / "hf_home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            # What nobody foresaw is a finding, not a line.
            "INDEXCACHE_TRACEBACK": "1",
            "COLUMNS": "120",
        }
        self._errors = open(self.folder / "server.err", "w")
        self._server = subprocess.Popen(
            [sys.executable, str(HERE / "fork_server.py")],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._read()
        self.templates = self.folder / "templates"
        if not self.templates.exists():
            self.call("templates:build_all", str(self.templates))
            self._convert_templates()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()
        self._errors.close()
        self.hub.__exit__()

    def _convert_templates(self) -> None:
        for name in ("deepseek", "glm"):
            box = self.templates / name
            found = self.run(box, ["convert", "source", "converted", "--pattern", "FSFS"])
            assert found.code == 0, found.err
            shutil.rmtree(box / "tmp", ignore_errors=True)

    # ---- sandboxes ----

    def box(self, template: str, name: str) -> Path:
        """A fresh sandbox: source/, converted/, work/, outside/; verbs run in it."""
        box = self.folder / "boxes" / name
        self.discard(box)
        shutil.copytree(self.templates / template, box, symlinks=True)
        (box / "tmp").mkdir()
        return box

    def discard(self, box: Path) -> None:
        """Remove a sandbox, whatever its permissions have become."""
        if not box.exists():
            return
        for folder, _, _ in os.walk(box):
            if not os.path.islink(folder):
                os.chmod(folder, 0o700)
        shutil.rmtree(box)

    # ---- runs ----

    def run(self, box: Path, argv: list[str], fault: dict | None = None, **environment: str) -> Run:
        """One verb in a sandbox."""
        return self.run_together(box, [(argv, fault, None)], **environment)[0]

    def run_together(
        self, box: Path, verbs: list[tuple[list[str], dict | None, str | None]], **environment: str
    ) -> list[Run]:
        """Verbs at once: their words, their faults, and after which pause they start."""
        commands = []
        for number, (argv, fault, after) in enumerate(verbs):
            command = self._command(box, number, environment) | {"argv": argv, "fault": fault}
            commands.append(command if after is None else command | {"after": after})
        self.hub.victim = Path(commands[0]["pid"])
        answers = self._ask(commands)
        return [
            Run(
                **answer,
                out=Path(command["out"]).read_text("utf-8", errors="replace"),
                err=Path(command["err"]).read_text("utf-8", errors="replace"),
                argv=tuple(command["argv"]),
            )
            for answer, command in zip(answers, commands)
        ]

    def call(self, function: str, *arguments: Any) -> Any:
        """What `module:function` returns, called in a child of the server."""
        command = self._command(self.folder, "call", {}) | {
            "call": function,
            "arguments": arguments,
            "answer": str(self.folder / "answer.json"),
        }
        found = self._ask([command])[0]
        if found["code"] != 0:
            raise RuntimeError(f"{function}: {found}\n" + Path(command["err"]).read_text(errors="replace"))
        return json.loads(Path(command["answer"]).read_text())

    def _command(self, cwd: Path, number: object, environment: dict[str, str]) -> dict[str, Any]:
        return {
            "cwd": str(cwd),
            "out": str(self.folder / f"{number}.out"),
            "err": str(self.folder / f"{number}.err"),
            "pid": str(self.folder / f"{number}.pid"),
            "env": {"TMPDIR": str(cwd / "tmp"), **environment},
        }

    def _ask(self, commands: list[dict]) -> list[dict]:
        Path(commands[0]["cwd"], "tmp").mkdir(exist_ok=True)
        job = {"commands": commands, "seconds": self.seconds, "memory": self.memory}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        line = self._server.stdout.readline()
        if not line:
            self._errors.flush()
            raise RuntimeError("the fork server died:\n" + (self.folder / "server.err").read_text()[-3000:])
        return json.loads(line)
