"""Which addresses are public, however they are written, and that a name is no better than the worst of its addresses."""

import asyncio
import ipaddress
import socket

import pytest
from gristmill.shards.ingest.target import BadUrl, parse
from gristmill.shards.ingest.vetting import Blocked, Vetting, literal, refusal
from hypothesis import given
from hypothesis import strategies as st

REFUSED = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "100.127.255.255",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.169.254",
    "169.254.170.2",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.1",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.9",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::8.8.8.8",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:10.0.0.1",
    "::ffff:0:127.0.0.1",
    "64:ff9b::127.0.0.1",
    "64:ff9b::169.254.169.254",
    "64:ff9b:1::8.8.8.8",
    "100::1",
    "2001::1",
    "2001:0:53aa::1",
    "2001:db8::1",
    "2001:10::1",
    "2002:7f00:1::",
    "2002:808:808::",
    "2606:4700::5efe:127.0.0.1",
    "2606:4700::200:5efe:10.0.0.1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fd12::1",
    "fe80::1",
    "fe80::1%eth0",
    "2606:4700::1111%eth0",
    "fec0::1",
    "ff02::1",
    "4000::1",
]
PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "9.255.255.255",
    "11.0.0.0",
    "100.63.255.255",
    "100.128.0.0",
    "128.0.0.1",
    "168.63.129.15",
    "169.253.255.255",
    "172.15.255.255",
    "172.32.0.0",
    "192.169.0.0",
    "223.255.255.254",
    "2606:4700:4700::1111",
    "2a00:1450:4001::8a",
    "64:ff9b::8.8.8.8",
    "::ffff:8.8.8.8",
    "2606:4700::5efe:8.8.8.8",
]


@pytest.mark.parametrize("address", REFUSED)
def test_what_is_not_public_is_refused(address: str):
    found = ipaddress.ip_address(address)
    assert refusal(found)
    with pytest.raises(Blocked, match=r"which is \w+"):
        Vetting().check(found)
    Vetting(allow_private=True).check(found)


@pytest.mark.parametrize("address", PUBLIC)
def test_what_is_public_is_not(address: str):
    assert refusal(ipaddress.ip_address(address)) == ""
    Vetting().check(ipaddress.ip_address(address))


@given(st.integers(0, 2**32 - 1))
def test_no_ipv4_address_is_public_in_disguise_only(number: int):
    plain = ipaddress.IPv4Address(number)
    if plain.is_private or plain.is_multicast or plain.is_reserved or not plain.is_global:
        assert refusal(plain)
    for prefix in ("::ffff:0:0", "64:ff9b::"):
        disguised = ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) + number)
        assert bool(refusal(disguised)) == bool(refusal(plain))
    assert refusal(ipaddress.IPv6Address(number))
    assert refusal(ipaddress.IPv6Address((0x2002 << 112) + (number << 80)))


@given(st.integers(0, 2**128 - 1))
def test_no_ipv6_address_is_public_that_python_or_the_registry_calls_otherwise(number: int):
    address = ipaddress.IPv6Address(number)
    if address.is_private or address.is_multicast or address.is_link_local or number >> 125 != 1:
        assert refusal(address) or address in ipaddress.ip_network("64:ff9b::/96")


@pytest.mark.parametrize(
    "written",
    ["127.0.0.1", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "127.0.0.1."],
)
def test_an_address_may_be_written_in_many_ways(written: str):
    assert literal(written) == ipaddress.ip_address("127.0.0.1")
    target = parse(f"http://{written}:8080/x?y")
    assert (target.address, target.host, target.url.host) == (ipaddress.ip_address("127.0.0.1"), *2 * ["127.0.0.1"])


@pytest.mark.parametrize(
    "name", ["example.org", "0x7f.example", "7.example", "beef", "0xzz", "1-2", "xn--bcher-kva.example"]
)
def test_a_name_is_no_address(name: str):
    assert literal(name) is None
    assert parse(f"https://{name}/").address is None


def test_other_scripts_are_read_before_the_address_is_looked_for():
    assert parse("http://１２７。0。0．1/").host == "127.0.0.1"
    assert parse("http://Bücher.example/ü?ü").url.human_repr().startswith("http://bücher.example/")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://a.example/x",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "pipe:ls",
        "//a.example/x",
        "a.example/x",
        "http:///x",
        "http://",
        "http://a.example:99999/",
        "http://a.example:x/",
        "http://[::1/",
        "http://[fe80::1%25eth0]/",
        "http://a..example/",
        "http://1.2.3.4.5/",
        "http://256.1.1.1/",
        "http://0x100000000/",
        "http://08.8.8.8/",
        "http://a%20b.example/",
        "http://a\x7fb.example/",
        "http://-a_b.example!/",
        "http://a.example%2f@127.0.0.1:x/",
        "http://" + "a" * 64 + ".example/",
        "http://" + "a." * 130 + "example/",
        "http://a.example/" + "x" * 8000,
        "",
        " ",
        "http://a b/",
    ],
)
def test_what_cannot_be_asked_is_refused_without_a_word_of_it(url: str):
    with pytest.raises(BadUrl) as caught:
        parse(url)
    assert "example" not in str(caught.value)
    assert "passwd" not in str(caught.value)


@given(st.text(max_size=40))
def test_any_text_is_a_target_or_a_bad_url(text: str):
    for url in (text, f"http://{text}", f"http://a.example/{text}"):
        try:
            target = parse(url)
        except BadUrl:
            continue
        assert target.url.scheme in ("http", "https")
        assert target.url.raw_host == target.host
        assert target.url.user is None


@given(st.text(max_size=40))
def test_any_location_leads_somewhere_or_is_a_bad_url(text: str):
    start = parse("http://a.example/b/c")
    for location in (text, "//" + text, text.encode().decode("utf-8", "surrogateescape")):
        try:
            there = start.redirected(location)
        except BadUrl:
            continue
        assert there.url.scheme in ("http", "https")


def test_a_password_goes_to_its_own_origin_only_and_is_never_shown():
    target = parse("https://user:CANARY@a.example/x?token=CANARY")
    assert target.authorization == "Basic dXNlcjpDQU5BUlk="
    assert "CANARY" not in repr(target)
    assert target.redirected("/y").authorization == target.authorization
    for elsewhere in ("https://b.example/", "http://a.example/x", "https://a.example:444/", "//b.example/"):
        assert target.redirected(elsewhere).authorization is None
    with pytest.raises(BadUrl, match="a user in it"):
        target.redirected("https://user:CANARY@a.example/y")


def resolve(vetting: Vetting, host: str = "a.example") -> list[str]:
    async def ask() -> list[str]:
        try:
            return [found["host"] for found in await vetting.resolve(host, 80)]
        finally:
            await vetting.close()

    return asyncio.run(ask())


def test_a_name_is_resolved_to_all_its_addresses():
    assert resolve(Vetting(lookup=lambda *_: ["8.8.8.8", "2606:4700::1"])) == ["8.8.8.8", "2606:4700::1"]


@pytest.mark.parametrize("found", [["8.8.8.8", "10.0.0.1"], ["10.0.0.1", "8.8.8.8"], ["8.8.8.8", "::1"]])
def test_a_name_with_one_address_that_is_refused_is_refused(found: list[str]):
    with pytest.raises(Blocked, match=r"a\.example is "):
        resolve(Vetting(lookup=lambda *_: found))
    assert resolve(Vetting(lookup=lambda *_: found, allow_private=True)) == found


def test_this_machine_is_refused_by_name():
    with pytest.raises(Blocked, match="loopback"):
        resolve(Vetting(), "localhost")


def test_a_name_without_an_address_is_no_host():
    with pytest.raises(socket.gaierror):
        resolve(Vetting(lookup=lambda *_: []))


def test_no_socket_is_made_for_an_address_that_is_refused():
    vetting = Vetting(allowed=["127.0.0.2"])
    info = (socket.AF_INET, socket.SOCK_STREAM, 0, "")
    with pytest.raises(Blocked):
        vetting.socket_for((*info, ("127.0.0.1", 80)))
    vetting.socket_for((*info, ("127.0.0.2", 80))).close()
