"""By which of the two ways this process loads models: the installed package, or the code beside the weights."""

import os
import sys

REMOTE = os.environ.get("INDEXCACHE_ECOSYSTEM_WAY") == "remote"
#: What a script of a process of its own begins with. None in sys.modules is what "not installed" looks like.
BEGIN = "import sys; sys.modules['indexcache'] = None" if REMOTE else "import sys, indexcache"


def hide_package():
    """In the remote way nothing may import the package."""
    if REMOTE:
        sys.modules["indexcache"] = None
