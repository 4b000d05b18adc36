"""What setup.cfg promises is what `make test-oldest` installs, and the extras hold together."""

import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def floors():
    """Package -> lowest version that setup.cfg allows, of everything that users install."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = dict(setup["options.extras_require"])
    wanted = setup["options"]["install_requires"] + "".join(
        extras[name] for name in ("triton", "train", "lora", "eval", "plots")
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
