from importlib import metadata

from indexcache.conversion.convert.installed_versions import installed_versions


def test_what_is_not_installed_has_no_version_and_raises_nothing():
    found = installed_versions("torch", "a-package-that-nobody-wrote")
    assert found == {"torch": metadata.version("torch"), "a-package-that-nobody-wrote": None}
