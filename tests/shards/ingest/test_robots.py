"""X-Robots-Tag, as sites write it."""

import pytest
from gristmill.shards.ingest.robots import forbidden, token_of


@pytest.mark.parametrize(
    ("headers", "rule"),
    [
        ([], ""),
        (["all"], ""),
        (["noai"], "noai"),
        (["NoAI, NoImageAI"], "noai"),
        (["nofollow , noimageai"], "noimageai"),
        (["nofollow", "noarchive", "noindex"], "noindex"),
        (["noimageindex"], "noimageindex"),
        (["none"], "none"),
        (["nofollow, nosnippet"], ""),
        (["noaint"], ""),
        (["otherbot: noai, noindex"], ""),
        (["OtherBot: noai", "GristMill: noai"], "noai"),
        (["gristmill: nofollow, noai"], "noai"),
        (["*: noai"], "noai"),
        (["noai, otherbot: nofollow"], "noai"),
        (["otherbot: nofollow, gristmill: noai"], "noai"),
        (["otherbot: nofollow, noai"], ""),
        (["max-snippet: 20, noai"], "noai"),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST, noai"], "noai"),
        (["unavailable_after: Fri, 25 Jun 2010 15:00:00 PST"], ""),
        (["max-image-preview:none"], ""),
        ([":", ",", "::,:", ""], ""),
    ],
)
def test_rules(headers: list[str], rule: str):
    assert forbidden(headers, "gristmill") == rule


def test_the_name_that_headers_call_us_by():
    assert token_of("Gristmill/1.0 (+https://a.example/bot)") == "gristmill"
    assert token_of("crawler of ours") == "crawler"
