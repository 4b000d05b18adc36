"""Tests marked `interpreted` run in Triton's interpreter, which is chosen when triton is imported.

They are cases like others, of files like others: what a case does here is to ask another process for it, which is
started once, when the first such case needs it.
"""

import atexit
import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from testing.time_limits import PROCESS_SECONDS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Interpreter:
    """A process that runs tests by their names, with TRITON_INTERPRET=1."""

    def __init__(self):
        ours, theirs = os.pipe()
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
        paths = [str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        # What a case prints is told with its failure, and does not mix with the answers.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "testing.fresh_process", str(theirs)],
            env=environment,
            stdin=subprocess.PIPE,
            text=True,
            pass_fds=(theirs,),
        )
        os.close(theirs)
        self._answers = os.fdopen(ours)
        atexit.register(self.stop)

    def run(self, config, nodeid):
        """Whether a case passed, was skipped or failed, and what was printed."""
        command = [f"{config.rootpath}/{nodeid}", f"--rootdir={config.rootpath}", f"-c{config.inipath}"]
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer = self._answers.readline()
        if not answer:
            pytest.fail(f"the interpreter's process ended with {self._process.wait(PROCESS_SECONDS)}", pytrace=False)
        return json.loads(answer)

    def stop(self):
        self._process.stdin.close()
        self._process.wait(PROCESS_SECONDS)


_interpreter = None


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run a case that is marked so in the interpreter's process."""
    global _interpreter
    if INTERPRETED or pyfuncitem.get_closest_marker("interpreted") is None:
        return None
    if _interpreter is None:
        _interpreter = Interpreter()
    outcome, printed = _interpreter.run(pyfuncitem.config, pyfuncitem.nodeid)
    if outcome != "passed":
        pytest.fail(f"in Triton's interpreter:\n{printed[-6000:]}", pytrace=False)
    return True


def run_worker(folder, worker):
    """Run the tests of a file in a process of its own: of `interpret_*.py` with TRITON_INTERPRET=1, others without."""
    env = dict(os.environ, OMP_NUM_THREADS="1")
    env.pop("TRITON_INTERPRET", None)
    if worker.startswith("interpret"):
        env["TRITON_INTERPRET"] = "1"
    path = Path(folder) / f"{worker}.py"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--show-capture=no", str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PROCESS_SECONDS)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


class Outcomes:
    """Counts what pytest says of the one case that it runs."""

    def __init__(self):
        self.passed = 0

    def pytest_runtest_logreport(self, report):
        """Called for each phase of the case."""
        self.passed += report.when == "call" and report.passed


def serve(answers):
    """Run the cases that come in, a line each, until there are no more."""
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly", "--show-capture=no"]
    for line in sys.stdin:
        printed, outcomes = io.StringIO(), Outcomes()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = pytest.main([*options, *json.loads(line)], plugins=[outcomes])
        outcome = "passed" if code == 0 and outcomes.passed == 1 else "failed"
        answers.write(json.dumps([outcome, printed.getvalue()]) + "\n")
        answers.flush()


if __name__ == "__main__":
    with os.fdopen(int(sys.argv[1]), "w") as file:
        serve(file)
