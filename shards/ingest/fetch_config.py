"""How urls are fetched: limits, patience, manners. Apart from the code that fetches, which is slow to import."""

from __future__ import annotations

from pydantic import BaseModel, Field

MOST_SLOTS = 256  # requests to one host that can be told apart


class FetchConfig(BaseModel, frozen=True, extra="forbid"):
    """How urls are fetched. Seconds and bytes."""

    per_host: int = Field(default=8, ge=1, le=MOST_SLOTS, description="requests to one host at once, of all processes")
    in_flight: int = Field(default=64, ge=1, description="requests of this process at once")
    window: int = Field(default=4096, ge=1, description="urls that may be ahead of the oldest unfinished one")
    window_bytes: int = Field(default=128 << 20, ge=1, description="bytes that those may hold")
    timeout: float = Field(default=30.0, gt=0, description="for one request, from asking to the last byte")
    connect_timeout: float = Field(default=10.0, gt=0, description="until there is a connection")
    stall_timeout: float = Field(default=15.0, gt=0, description="without a byte")
    min_rate: float = Field(default=1024.0, ge=0, description="bytes/s; slower, after a stall_timeout, is too slow")
    tries: int = Field(default=3, ge=1, description="requests for one url, redirects not counted")
    first_pause: float = Field(default=0.5, gt=0, description="shortest pause before a second try")
    longest_pause: float = Field(default=60.0, gt=0, description="longest pause, one that a server asks for included")
    max_bytes: int = Field(default=64 << 20, ge=1, description="of one image")
    redirects: int = Field(default=5, ge=0, description="followed for one url")
    give_up_after: int = Field(default=20, ge=1, description="failures in a row to reach a host that end its tries")
    give_up_seconds: float = Field(default=600.0, gt=0, description="for which it is left alone then")
    user_agent: str = Field(
        default="gristmill",
        pattern=r"^[!-~][ -~]*$",
        description="who asks; up to a / or a blank it is our name in X-Robots-Tag",
    )
    allow_private: bool = Field(default=False, description="connect to private, loopback and link-local addresses too")
    respect_robots: bool = Field(default=True, description="heed X-Robots-Tag: noai, noimageai, noindex, noimageindex")
