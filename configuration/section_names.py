"""How a saved checkpoint's code names its sections and what is imported from them; see `module_sections.py`."""

from __future__ import annotations

#: The line before a section.
SECTION = "# ======== module {} ========"


def name_of(module: str, name: str) -> str:
    """Under what `name` of a section is imported from `module_sections`."""
    return f"{module}__{name}"


def parts_of(name: str) -> tuple[str, str]:
    """The section and the name in it; no module has two underscores in its name."""
    module, _, wanted = name.partition("__")
    return module, wanted
