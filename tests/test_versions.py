"""What setup.cfg promises is what `make test-oldest` installs, and the extras hold together."""

import configparser
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def setup_cfg():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup


def extras():
    """Requirements by extra, those for developers aside."""
    found = {name: lines.split("\n")[1:] for name, lines in setup_cfg()["options.extras_require"].items()}
    return {name: lines for name, lines in found.items() if name not in ("test", "dev", "ecosystem")}


def floors():
    """Package -> lowest version that setup.cfg allows, of everything that users install."""
    wanted = setup_cfg()["options"]["install_requires"] + "\n".join(
        ["", *(line for one in extras().values() for line in one)]
    )
    found = {}
    for line in wanted.split("\n"):
        if match := re.match(r"([\w-]+)>=([\d.]+)", line.strip()):
            found.setdefault(match[1], set()).add(match[2])
    return found


def pinned(name):
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def numbers(version):
    return [int(part) for part in version.split(".")]


def test_the_oldest_set_is_the_floor_of_every_range():
    oldest = pinned("constraints-oldest.txt")
    for package, versions in floors().items():
        (floor,) = versions
        short = numbers(oldest[package])[: len(numbers(floor))]
        assert short == numbers(floor), f"{package}: setup.cfg allows {floor}, tested is {oldest[package]}"


@pytest.mark.parametrize("package", sorted(floors()))
def test_the_pinned_set_is_within_every_range(package):
    (floor,) = floors()[package]
    tested = pinned("constraints.txt").get(package)
    assert tested is None or numbers(tested) >= numbers(floor)


@pytest.mark.parametrize("extra", sorted(extras()))
def test_every_extra_is_installed_for_the_tests_and_used_by_one(extra):
    """A test that needs a package is skipped for everybody where `test` does not bring it."""
    tested = setup_cfg()["options.extras_require"]["test"].split("\n")
    texts = [path.read_text() for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    for requirement in extras()[extra]:
        package = re.match(r"[\w-]+", requirement)[0]
        assert requirement in tested
        assert importlib.util.find_spec(package) is not None
        assert any(re.search(rf"\b{package}\b", text) for text in texts), f"no test names {package}"


def test_every_tool_of_the_ecosystem_has_a_row():
    rows = "".join(path.read_text() for path in (ROOT / "tests" / "ecosystem").glob("test_*.py"))
    listed = setup_cfg()["options.extras_require"]["ecosystem"].split("\n")[1:]
    for requirement in listed:
        package = re.match(r"[\w-]+", requirement)[0]
        assert re.search(rf'package=[^)]*"{package}"', rows), f"no row runs {package}"
