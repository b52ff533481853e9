"""HAProxy, where it can be had."""

from __future__ import annotations

import pytest

from tests.docker.haproxy import Haproxy, NoHaproxyError, find_haproxy


@pytest.fixture(scope="session")
def haproxy() -> Haproxy:
    """HAProxy of the system or of Debian's package."""
    try:
        return find_haproxy()
    except NoHaproxyError as error:
        pytest.skip(str(error))
