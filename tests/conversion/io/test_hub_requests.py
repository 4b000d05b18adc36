"""Requests to a busy Hub: what is shown of the waiting, and what is asked again."""

import logging

import pytest
from huggingface_hub.utils import _http as library

from indexcache.conversion.io import hub_requests
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


def test_an_error_whose_body_is_no_text_is_asked_again_a_few_times(monkeypatch):
    waited, asked = [], []
    monkeypatch.setattr(hub_requests.time, "sleep", waited.append)

    def answers(garbled):
        asked.append(len(asked))
        if len(asked) <= garbled:
            b"\xc8".decode()
        return "whole"

    assert patiently(lambda: answers(1)) == "whole" and (len(asked), waited) == (2, [1.0])
    asked.clear()
    with pytest.raises(UnicodeDecodeError):
        patiently(lambda: answers(100))
    assert len(asked) == 3
