"""Requests to a busy Hub: what is shown of the waiting."""

import logging

from huggingface_hub.utils import _http as library

from indexcache.conversion.io.hub_requests import patiently


def test_a_warning_of_the_library_is_shown_once_a_request():
    shown = []
    logger = logging.getLogger("huggingface_hub.utils._http")
    assert library.logger.name == logger.name, "the library warns elsewhere"
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())
    logger.addHandler(handler)
    try:
        for _ in range(2):
            patiently(lambda: [logger.warning("retry %d of 5", number % 2) for number in range(6)])
            logger.warning("another request")
            logger.warning("another request")
    finally:
        logger.removeHandler(handler)
    assert shown == ["retry 0 of 5", "retry 1 of 5", "another request", "another request"] * 2
