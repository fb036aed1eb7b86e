"""What is shown while the client of the hub repeats a request to a server that does not answer."""

import logging

import pytest
from huggingface_hub.utils import _http

from selftrans.cli import hub_retries


@pytest.fixture
def logger(monkeypatch):
    found = logging.getLogger(hub_retries.LOGGER)
    assert found is _http.logger
    monkeypatch.setattr(found, "filters", [])
    monkeypatch.setattr(found, "propagate", True)
    return found


def test_repeated_requests_are_one_line_with_the_remedy(logger, monkeypatch, capsys, caplog):
    for _ in range(2):
        hub_retries.install()
    assert len(logger.filters) == 1

    monkeypatch.setattr(_http.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(_http.time, "sleep", lambda _: None)
    for _ in range(2):
        with pytest.raises(Exception, match="onnect"):
            _http.http_backoff("HEAD", "http://127.0.0.1:9/a/resolve/main/config.json", max_retries=2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "HF_HUB_OFFLINE=1" in said
    assert said.startswith("selftrans: 127.0.0.1 does not answer (") and "onnect" in said
    assert not caplog.records


def test_other_lines_of_the_client_are_shown(logger, capsys, caplog):
    hub_retries.install()
    logger.warning("Rate limited. Waiting 9s before retry [Retry 1/5].")
    assert [record.getMessage() for record in caplog.records] == ["Rate limited. Waiting 9s before retry [Retry 1/5]."]
    assert capsys.readouterr().err.count("does not answer") == 0
