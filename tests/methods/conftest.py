"""Key statistics of the tiny models from a tiny text."""

import pytest


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mega_core.methods.covariance.LEAST_TOKENS", 0)
