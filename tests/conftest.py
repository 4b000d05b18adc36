"""Fixtures for tests that leave this process: a Hub of their own, and a Python without indexcache and triton."""

import os
import subprocess
import sys

import pytest
from huggingface_hub import constants
from testing.fresh_process import pytest_pyfunc_call  # noqa: F401 - a hook, of every test
from testing.hub_double import Hub
from testing.time_limits import PROCESS_SECONDS, TEST_SECONDS

# Every little model of the tests would have its kernels compiled in the background; tests of that ask for it.
os.environ.setdefault("INDEXCACHE_COMPILE_AHEAD", "0")
# None in sys.modules is what "not installed" looks like to `import` and to `importlib.util.find_spec`.
WITHOUT_PACKAGES = "import sys\nsys.modules['indexcache'] = sys.modules['triton'] = None\n"


# The double answers from a thread of the tests: on a busy machine ten seconds are soon over.
HUB_LIMITS = ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT")


def pytest_collection_modifyitems(config, items):
    """Every test may hang as long as `time_limits` says, but those that say so themselves."""
    if config.pluginmanager.has_plugin("timeout"):
        for item in items:
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(TEST_SECONDS))


@pytest.fixture
def hub():
    """An empty Hub test double, served until the test ends."""
    with Hub() as server:
        yield server


@pytest.fixture
def hub_here(hub, monkeypatch):
    """The double, with this process turned to it; what the environment sets before import is set here."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in HUB_LIMITS:
        monkeypatch.setattr(constants, name, PROCESS_SECONDS)
    monkeypatch.setenv("HF_TOKEN", "any")
    return hub


@pytest.fixture
def run_python(tmp_path):
    """Run a script in a Python process of its own; `installed=False` hides indexcache and triton from it.

    Returns the finished process; its failure fails the test unless `check=False`.
    """

    def run(script, *args, installed=False, hub=None, check=True, token="any", **variables):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        environment |= {
            "HF_HOME": str(tmp_path / "hf_home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **dict.fromkeys(HUB_LIMITS, str(PROCESS_SECONDS)),
            "OMP_NUM_THREADS": "1",
            **({"HF_HUB_OFFLINE": "1"} if hub is None else {"HF_ENDPOINT": hub.url}),
            **({} if token is None else {"HF_TOKEN": token}),
            **variables,
        }
        process = subprocess.run(
            [
                sys.executable,
                "-I",
                "-c",
                ("import sys\n" if installed else WITHOUT_PACKAGES) + script,
                *map(str, args),
            ],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=PROCESS_SECONDS,
        )
        if check:
            assert process.returncode == 0, process.stdout + process.stderr
        return process

    return run
