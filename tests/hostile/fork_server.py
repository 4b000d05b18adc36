"""A process with everything imported that forks a child for every try, so that a try costs milliseconds and a crash,
a hang or a runaway of memory stays its own.

Reads jobs as lines of JSON on stdin, answers each with a line of JSON. A job is a list of commands that run at once:

    argv    words after `indexcache`; or `call` ("module:function") and `arguments` (JSON values)
    cwd     folder it runs in, which `faults.py` watches
    out     file for stdout; `err` for stderr; `answer` for what a `call` returns
    env     variables to set
    fault   see `faults.install`
    after   a file: start when it exists (the pause of another command), and touch `<file>.go` when done

and the answer for each: exit code or signal, whether it ran out of time, memory beyond the server's own, seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
# Folders whose modules the templates and checks import.
MODULES = [HERE, TESTS]
PRELOADED = (
    "indexcache.cli",
    "indexcache.conversion.convert.convert",
    "indexcache.conversion.check.describe",
    "indexcache.conversion.check.drawing",
    "indexcache.conversion.publish.export",
    "indexcache.conversion.publish.hub",
    "indexcache.conversion.io.load_source",
    "indexcache.conversion.check.verify",
    "indexcache.distillation.run",
    "indexcache.distillation.source",
    "indexcache.evaluation.report",
    "indexcache.evaluation.run",
    "indexcache.pattern_search.run",
    "indexcache.pattern_search.drawing",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.deepseek_v32.modeling_deepseek_v32",
    "transformers.models.glm_moe_dsa.modeling_glm_moe_dsa",
    "transformers.trainer",
    "transformers.generation.utils",
    "pydantic",
    "typer._adapters",
    "rich.console",
    "rich.table",
    "checks",
    "faults",
    "templates",
)
GIBIBYTE = 2**30
# Address space beyond the server's: what no watching of resident memory can miss.
ADDRESS_SPACE = 6 * GIBIBYTE


def main() -> None:
    sys.path[:0] = [str(folder) for folder in MODULES]
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    _check_bundle_once()
    # The children's stdout is theirs: answers go out by another descriptor.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    own = _resident(os.getpid())
    answers.write(json.dumps({"ready": own}) + "\n")
    answers.flush()
    for line in sys.stdin:
        job = json.loads(line)
        answers.write(json.dumps(_run(job["commands"], job["seconds"], job["memory"], own)) + "\n")
        answers.flush()


def _check_bundle_once() -> None:
    """The shipped code is the package's own and the same for every try: most of a small conversion's time."""
    from indexcache.conversion.publish import bundle

    with tempfile.TemporaryDirectory() as folder:
        bundle.write_bundle(folder)
    bundle.check_bundle = lambda files: None


def _run(commands: list[dict], seconds: float, memory: int, own: int) -> list[dict]:
    found: list[dict | None] = [None] * len(commands)
    children: dict[int, tuple[int, float]] = {}
    begun = time.monotonic()
    waiting = dict(enumerate(commands))
    while waiting or children:
        for number, command in list(waiting.items()):
            if "after" not in command or os.path.exists(command["after"]) or not (children or len(waiting) > 1):
                children[_fork(command)] = (number, time.monotonic())
                del waiting[number]
        pid, status, usage = os.wait4(-1, os.WNOHANG)
        if pid in children:
            number, started = children.pop(pid)
            found[number] = _finished(status, usage, time.monotonic() - started, own, found[number])
            if "after" in commands[number]:
                Path(commands[number]["after"] + ".go").touch()
            continue
        for pid, (number, _) in children.items():
            late = time.monotonic() - begun > seconds
            if late or _resident(pid) - own > memory:
                found[number] = {"late": late, "greedy": not late}
                os.killpg(pid, signal.SIGKILL)
        time.sleep(0.002)
    return found  # type: ignore[return-value]


def _finished(status: int, usage: resource.struct_rusage, wall: float, own: int, stopped: dict | None) -> dict:
    killed = os.WIFSIGNALED(status)
    return {
        "code": None if killed else os.WEXITSTATUS(status),
        "signal": os.WTERMSIG(status) if killed else None,
        "memory": max(0, usage.ru_maxrss * 1024 - own),
        "cpu": usage.ru_utime + usage.ru_stime,
        "wall": wall,
        **(stopped or {"late": False, "greedy": False}),
    }


def _resident(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _fork(command: dict) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = _child(command)
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except (OSError, ValueError):
                    code = code or 70
            os._exit(code)
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)  # here too, so that it can be killed as a group at once
    return pid


def _child(command: dict) -> int:
    os.setpgid(0, 0)
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, command["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, command["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    if "pid" in command:
        Path(command["pid"]).write_text(str(os.getpid()))
    os.chdir(command["cwd"])
    os.environ.update(command.get("env", {}))
    tempfile.tempdir = os.environ.get("TMPDIR")
    space = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (space + ADDRESS_SPACE, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    import faults

    if "call" in command:
        module, _, function = command["call"].partition(":")
        answer = getattr(importlib.import_module(module), function)(*command["arguments"])
        Path(command["answer"]).write_text(json.dumps(answer))
        return 0
    faults.install(command.get("fault") or {}, Path(command["cwd"]))
    return _run_verb(command["argv"])


def _run_verb(argv: list[str]) -> int:
    """What the `indexcache` script does, and what Python does with an error that nobody caught."""
    from indexcache.cli import main as indexcache

    sys.argv = ["indexcache", *argv]
    try:
        indexcache()
    except SystemExit as leaving:
        code = leaving.code
        if code is None or isinstance(code, int):
            return code or 0
        print(code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        # A thread that never ends keeps a process from ending.
        threading._shutdown()
    return 0


if __name__ == "__main__":
    main()
