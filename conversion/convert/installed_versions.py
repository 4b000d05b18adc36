"""Versions for the records of how a file was made."""

from __future__ import annotations

from importlib import metadata


def installed_versions(*packages: str) -> dict[str, str | None]:
    """Each package's version, None for one that is not installed (a source tree that is only on the path, say)."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found
