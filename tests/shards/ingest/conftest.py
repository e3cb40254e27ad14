"""What tests of whole ingests share: processes that start in milliseconds, for one start of an ingest each."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ...workers import Workers

IMPORTS = f"""
    import sys
    sys.path.insert(0, {str(Path(__file__).parents[3])!r})
    from tests.shards.ingest.life import command, live, warm
    warm()
"""


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Each can say `live(source, out, ...)` or `command([argument, ...])`, as life.py has them."""
    with Workers(IMPORTS) as workers:
        yield workers
