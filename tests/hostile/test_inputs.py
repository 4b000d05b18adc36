"""A few tries of every kind of hostile input; `make hostile` goes on for as long as it is let."""

import pytest
from campaign import KINDS, one

SEED = 0
# Of each kind: 140 inputs in all.
TRIES = 7


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_hostile_inputs_break_no_rule(shop, kind):
    verdicts = [one(shop, kind, SEED, number) for number in range(TRIES)]
    broken = [str(verdict) for verdict in verdicts if verdict.findings]
    assert not broken, "\n\n".join(["", *broken])
