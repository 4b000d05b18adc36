"""One workshop for all hostile tests of a process."""

import pytest
from workshop import Workshop


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    with Workshop(tmp_path_factory.mktemp("hostile")) as workshop:
        yield workshop
