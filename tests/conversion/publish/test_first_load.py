"""The first load of a checkpoint from the Hub: how many files and requests its code is, and what it prints."""

import json
from pathlib import Path

from testing.tiny_models import tiny_model

import indexcache

LOAD = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("tester/dsa", trust_remote_code=True)
print(type(model).__name__)
"""


def test_a_first_load_asks_for_few_files(tmp_path, hub, run_python):
    tiny_model(index_share_pattern="FSFS").save_pretrained(tmp_path / "model")
    code = sorted(path.name for path in (tmp_path / "model").glob("*.py"))
    hub.put(tmp_path / "model", "tester/dsa")
    process = run_python(LOAD, hub=hub)
    assert process.stdout.split() == ["IndexCacheForCausalLM"]
    lines = process.stderr.splitlines()
    # One file a module, these were 101, 212 and 406.
    assert len(code) <= 12 and len(hub.requests) <= 40 and len(lines) <= 60, (code, hub.requests, lines)


SOURCES = """
import inspect, json
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
here = type(model).__module__.rpartition(".")[0]
found = {}
for name, module in list(sys.modules.items()):
    if name.startswith(here + "."):
        for value in vars(module).values():
            function = getattr(value, "fn", value)
            if getattr(function, "__module__", None) == name and hasattr(function, "__code__"):
                found[f"{name.rpartition('.')[2]}.{function.__name__}"] = inspect.getsource(function)
print(json.dumps(found))
"""


def test_functions_of_a_section_have_their_source(tmp_path, run_python):
    """Triton compiles what `inspect` finds: of every function, kernels first, it is what the package has."""
    tiny_model(index_share_pattern="FSFS").save_pretrained(tmp_path / "model")
    process = run_python(SOURCES, tmp_path / "model", installed=True)
    found = json.loads(process.stdout.splitlines()[-1])
    kernels = 0
    package = Path(indexcache.__file__).parent
    files = {
        path.stem: path
        for top in ("configuration", "kernels", "modeling_indexcache")
        for path in package.glob(f"{top}/**/*.py")
    }
    for name, source in found.items():
        text = files[name.partition(".")[0]].read_text()
        lines = [line for line in source.splitlines() if "module_sections import" not in line and "__" not in line]
        assert all(line in text for line in lines), name
        assert f"def {name.partition('.')[2]}(" in source or "lambda" in source, name
        kernels += "@triton.jit" in source
    assert kernels > 50 and len(found) > 300


TRACE = """
from transformers import AutoModelForCausalLM
import torch, traceback
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
try:
    model(torch.arange(12)[None], unheard_of=1)
except TypeError:
    print(traceback.format_exc())
"""


def test_a_traceback_shows_the_lines_of_a_section(tmp_path, run_python):
    tiny_model(index_share_pattern="FSFS").save_pretrained(tmp_path / "model")
    trace = run_python(TRACE, tmp_path / "model").stdout
    assert "modeling_indexcache_sections.py" in trace and "raise TypeError(" in trace
