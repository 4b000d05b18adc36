"""`transformers serve` finds the model's class in `transformers`; tests/ecosystem runs the server itself."""

import inspect

import pytest

# Config first: the order in which a server comes to it, with transformers' second module of that name behind.
SERVED = """
from transformers import AutoConfig
from transformers.cli.serving import model_manager
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
found = getattr(model_manager.transformers, config.architectures[0])
model = found.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__name__, type(model).__module__.partition(".")[0])
"""


@pytest.mark.parametrize("installed", [True, False])
def test_the_servers_look_up_loads_the_model(tmp_path, run_python, installed):
    from testing.tiny_models import tiny_model

    tiny_model(index_share_pattern="FSFS").save_pretrained(tmp_path / "model")
    script = ("import indexcache\n" if installed else "") + SERVED
    process = run_python(script, tmp_path / "model", installed=installed)
    expected = "indexcache" if installed else "transformers_modules"
    assert process.stdout.split() == ["IndexCacheForCausalLM", expected]


def test_this_transformers_still_looks_it_up_there():
    """When this fails, the attribute is needed no more: architecture_attribute.py goes, or names its last release."""
    manager = pytest.importorskip("transformers.cli.serving.model_manager")
    assert "getattr(transformers, config.architectures[0])" in inspect.getsource(manager)


def test_a_class_of_transformers_own_stays(monkeypatch):
    import transformers

    from indexcache.configuration import architecture_attribute

    own = type("Own", (), {})
    monkeypatch.setattr(transformers, architecture_attribute.ARCHITECTURE, own, raising=False)
    architecture_attribute.offer_architecture()
    assert getattr(transformers, architecture_attribute.ARCHITECTURE) is own


def test_releases_that_were_not_read_get_nothing(monkeypatch):
    import transformers

    from indexcache.configuration import architecture_attribute

    monkeypatch.delattr(transformers, architecture_attribute.ARCHITECTURE, raising=False)
    monkeypatch.setattr(architecture_attribute.transformers, "__version__", "6.0.0")
    architecture_attribute.offer_architecture()
    assert architecture_attribute.ARCHITECTURE not in vars(transformers)
