"""A saved checkpoint carries code that loads where neither indexcache nor triton is installed, and saves again."""

import ast

import pytest
import torch
from testing.tiny_models import tiny_model
from transformers.dynamic_module_utils import get_relative_import_files

from indexcache import IndexCacheConfig, SharePattern
from indexcache.configuration.hub_code import AUTO_MAP
from indexcache.conversion.publish.bundle import check_bundle, write_bundle

# Loads, checks against the weights of the folder it came from, saves again, loads that too.
LOAD_AND_SAVE_AGAIN = """
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
source, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
ids = torch.arange(12)[None]
tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
assert tokens.shape == (1, 17)
assert model.explain_paths().prefill.runs == "streamed, in place", model.explain_paths()
model.save_pretrained(target)
again = AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)
here, there = model.state_dict(), again.state_dict()
assert here.keys() == there.keys()
assert all(torch.equal(here[name], there[name]) for name in here)
assert torch.equal(again.generate(ids, max_new_tokens=5, do_sample=False), tokens)
assert type(AutoModel.from_pretrained(target, trust_remote_code=True)).__name__ == "IndexCacheModel"
AutoConfig.from_pretrained(source, trust_remote_code=True).save_pretrained(target + "-config")
print(tokens[0].tolist())
"""


@pytest.fixture
def model():
    return tiny_model(index_share_pattern="FSFS", eos_token_id=None)


def code_in(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.py")}


def test_installed_model_saves_code_that_loads_saves_and_loads_without_the_package(model, tmp_path, run_python):
    first, second = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(first)
    process = run_python(LOAD_AND_SAVE_AGAIN, first, second)

    ids = torch.arange(12)[None]
    here = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert process.stdout.splitlines()[-1] == str(here[0].tolist())
    assert code_in(first) == code_in(second)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert IndexCacheConfig.from_pretrained(second).auto_map == AUTO_MAP
    # The config alone, too, goes with the code that its class needs.
    assert {"configuration_indexcache.py", "share_pattern.py"} <= set(code_in(tmp_path / "second-config"))


def test_bundle_is_everything_the_model_imports_side_by_side(tmp_path):
    files = write_bundle(tmp_path)
    followed = get_relative_import_files(tmp_path / "modeling_indexcache.py")
    assert {path.name for path in files} == {"modeling_indexcache.py", *(name.rpartition("/")[2] for name in followed)}
    assert sorted(tmp_path.iterdir()) == files
    for path in files:
        text = path.read_text()
        assert "Apache-2.0" in text.splitlines()[0]
        assert not any(isinstance(node, ast.ImportFrom) and node.level > 1 for node in ast.walk(ast.parse(text)))


def test_bundle_is_deterministic_and_replaces_older_code(tmp_path):
    write_bundle(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/share_pattern.py").write_text("raise SystemExit")
    write_bundle(tmp_path / "b")
    assert code_in(tmp_path / "a") == code_in(tmp_path / "b")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("from . import share_pattern", "write 'from .file import name'"),
        ("from ..kernels.share_pattern import x", "write 'from .file import name'"),
        ("from .kernels.share_pattern import x", "not among the shipped files"),
        ("from .absent import x", "not among the shipped files"),
        ("import math; from .share_pattern import SharePattern", "not seen by transformers"),
        ("def f():\n    import indexcache.kernels", "no package `indexcache`"),
        ("try:\n    from indexcache import x\nexcept ImportError:\n    pass", "no package `indexcache`"),
        ("def f():\n    import triton", "put it inside one"),
        ('"""Shown as\nfrom .example import x\n"""', "not among the shipped files"),
    ],
)
def test_imports_that_the_loader_cannot_follow_are_refused(tmp_path, line, complaint):
    (tmp_path / "share_pattern.py").write_text("class SharePattern: ...\n")
    (tmp_path / "model.py").write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"model\.py.*" + complaint):
        check_bundle(sorted(tmp_path.iterdir()))


def test_allowed_imports_pass(tmp_path):
    (tmp_path / "share_pattern.py").write_text("class SharePattern: ...\n")
    (tmp_path / "model.py").write_text(
        "import torch\nfrom .share_pattern import (\n    SharePattern,\n)\n"
        "try:\n    import triton\nexcept ImportError:\n    triton = None\n"
    )
    check_bundle(sorted(tmp_path.iterdir()))


class TestFlattening:
    """`hub_code` on a small package of its own."""

    @pytest.fixture
    def package(self, tmp_path):
        source = {
            "modeling_indexcache/modeling_indexcache.py": "from ..kernels.op import (\n  f\n)\nfrom .part import h\n",
            "modeling_indexcache/part.py": "def h():\n    from ..configuration.configuration_indexcache import C\n",
            "configuration/configuration_indexcache.py": "C = 1\n",
            "configuration/module_sections.py": "SECTION_FILES: tuple[str, ...] = ()\n",
            "configuration/unused.py": "",
            "kernels/op.py": "f = 1\n",
        }
        root = tmp_path / "package"
        for name, text in source.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        return root

    @staticmethod
    def flatten(package, monkeypatch):
        from indexcache.configuration import hub_code

        monkeypatch.setattr(hub_code, "__file__", str(package / "configuration/hub_code.py"))
        return hub_code.hub_code()

    def test_imports_become_siblings_or_sections_and_unused_files_stay(self, package, monkeypatch):
        code = self.flatten(package, monkeypatch)
        assert list(code) == [
            "configuration_indexcache.py",
            "kernels_sections.py",
            "modeling_indexcache.py",
            "modeling_indexcache_sections.py",
            "module_sections.py",
        ]
        body = code["modeling_indexcache.py"].partition("\n")[2]
        assert body == (
            "from .module_sections import (\n    op__f as f\n)\nfrom .module_sections import part__h as h\n"
        )
        assert "# ======== module op ========\nf = 1\n" in code["kernels_sections.py"]
        assert "    from .configuration_indexcache import C\n" in code["modeling_indexcache_sections.py"]
        assert "('kernels_sections.py', 'modeling_indexcache_sections.py')" in code["module_sections.py"]

    def test_more_modules_are_no_more_files(self, package, monkeypatch):
        few = list(self.flatten(package, monkeypatch))
        for number in range(20):
            folder = package / f"kernels/operation_{number}"
            folder.mkdir()
            (folder / f"more_{number}.py").write_text("x = 1\n")
            with (package / "kernels/op.py").open("a") as file:
                file.write(f"from .operation_{number}.more_{number} import x\n")
        assert list(self.flatten(package, monkeypatch)) == few

    def test_two_files_of_one_name_are_refused(self, package, monkeypatch):
        (package / "kernels/part.py").write_text("")
        with pytest.raises(ValueError, match=r"both be saved as part\.py: rename"):
            self.flatten(package, monkeypatch)

    @pytest.mark.parametrize(
        "line", ["from ..conversion.convert import x", "from ...x import y", "from . import part", "from .. import x"]
    )
    def test_imports_of_what_does_not_ship_are_refused_by_line(self, package, monkeypatch, line):
        (package / "conversion").mkdir()
        (package / "conversion/convert.py").write_text("")
        (package / "kernels/op.py").write_text(f"import torch\n{line}\n")
        with pytest.raises(ValueError, match=r"op\.py:2: .*names no file that ships"):
            self.flatten(package, monkeypatch)


def test_pattern_survives_the_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert IndexCacheConfig.from_pretrained(tmp_path).share_pattern == SharePattern("FSFS")
