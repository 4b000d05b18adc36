"""What the rows of the ecosystem's table share: a checkpoint, the two ways to load it, and the record of what worked.

A row is a test: `@pytest.mark.row(tool, what, package=...)`. It runs twice, in processes of their own: from the
installed package, and from the code beside the weights where `indexcache` cannot be imported
(INDEXCACHE_ECOSYSTEM_WAY). A row whose package is absent is skipped. A row that proves a clear refusal says so by
`limit(reason)`, and stands in the table with that reason.
"""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from ecosystem.ways import BEGIN, REMOTE, hide_package
from testing.time_limits import PROCESS_SECONDS

ROOT = Path(__file__).parents[2]
RESULTS = os.environ.get("INDEXCACHE_ECOSYSTEM_RESULTS")
# Short prompts and trained weights: 12 layers, top-k 64, so that 100 tokens are beyond it.
PATTERN = "FFSSSSFFSSSS"
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

hide_package()
_outcomes = pytest.StashKey[dict]()


def pytest_configure(config):
    config.stash[_outcomes] = {}


def pytest_collection_modifyitems(config, items):
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.ecosystem)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    mark = item.get_closest_marker("row")
    if mark is None or (report.when != "call" and report.passed):
        return
    tool, what = mark.args
    reason = dict(report.user_properties).get("limit")
    if report.skipped:
        outcome = {"skipped": report.longrepr[2].removeprefix("Skipped: ")}
    elif report.failed:
        outcome = {"failed": str(call.excinfo.value).strip().partition("\n")[0][:200]}
    else:
        outcome = {"works": reason is None, "reason": reason}
    versions = {package: _version(package) for package in _packages(mark)}
    item.config.stash.setdefault(_outcomes, {})[f"{tool}: {what}"] = {
        "tool": tool,
        "what": what,
        "file": item.path.name,
        "versions": versions,
        **outcome,
    }


def pytest_sessionfinish(session):
    outcomes = session.config.stash.get(_outcomes, {})
    if RESULTS and outcomes:
        way = "remote" if REMOTE else "installed"
        path = Path(RESULTS)
        known = json.loads(path.read_text()) if path.is_file() else {}
        known[way] = known.get(way, {}) | outcomes
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=1) + "\n")


def _packages(mark):
    package = mark.kwargs["package"]
    return [package] if isinstance(package, str) else package


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@pytest.fixture(autouse=True)
def _with_its_packages(request):
    mark = request.node.get_closest_marker("row")
    absent = [package for package in _packages(mark) if _version(package) is None] if mark else []
    if absent:
        pytest.skip(f"{', '.join(absent)} is not installed")


@pytest.fixture
def limit(request):
    """Say why this row does not work, after proving that the user is told so."""
    return lambda reason: request.node.user_properties.append(("limit", reason))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The demo's model, converted by the command line, with a chat template."""
    folder = tmp_path_factory.mktemp("ecosystem") / "dsa_indexcache"
    command = ["convert", str(ROOT / "demo" / "dsa_demo"), str(folder), "--pattern", PATTERN]
    run([sys.executable, "-m", "indexcache.cli", *command], cwd=folder.parent)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def load(checkpoint):
    """Load a checkpoint as a user would, in fp32; checks that the class came from where it should."""
    import torch
    from transformers import AutoModelForCausalLM

    if not REMOTE:
        import indexcache  # noqa: F401 - Auto classes know the model from here on

    def loaded(path=checkpoint, auto=AutoModelForCausalLM, **options):
        model = auto.from_pretrained(path, trust_remote_code=REMOTE, **{"dtype": torch.float32, **options})
        assert type(model).__module__.partition(".")[0] == ("transformers_modules" if REMOTE else "indexcache")
        return model

    return loaded


@pytest.fixture
def tokenizer(checkpoint):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)


@pytest.fixture
def ids(tokenizer):
    """`[1, 96]`, more tokens than an indexer selects."""
    text = "Return the number of items in the list. Raise ValueError where there is none. " * 12
    return tokenizer(text, return_tensors="pt").input_ids[:, :96]


@pytest.fixture
def texts():
    """Short documents to train on."""
    return [f"The function number {number} returns the list of its {number} arguments." for number in range(16)]


def run(command, cwd, check=True, **variables):
    """A process that may not reach any network but this machine's."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
    finished = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=PROCESS_SECONDS
    )
    if check:
        assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    return finished


@pytest.fixture
def run_tool(tmp_path):
    """Run a command of a tool in an empty folder; where the package is hidden, its processes do not see it either.

    A process that is to load by the installed package imports it first, as its user would.
    """

    def started(module, *arguments, check=True, hub=None, **variables):
        script = (
            f"{BEGIN}; sys.argv = {[module, *map(str, arguments)]!r}; "
            f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
        )
        if hub is not None:
            variables |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "any", "HF_HUB_DISABLE_XET": "1"}
            variables |= {"HF_HOME": str(tmp_path / "hf_home")}
        return run([sys.executable, "-c", script], tmp_path, check=check, **variables)

    return started
