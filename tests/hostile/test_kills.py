"""Every long verb is stopped once or more at an arbitrary change of a file, and gone on with."""

import kills
import pytest
from campaign import one

SEED = 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(dict.fromkeys(kills.KINDS)))
def test_stopped_anywhere_it_ends_as_undisturbed(shop, kind):
    verdict = one(shop, kind, SEED, 0)
    assert not verdict.findings, f"\n\n{verdict}"
