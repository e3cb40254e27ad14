"""Names, ports and other hosts: whether metrics can be served, whether ranks would find each other."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import threading
import time

from ..launch_place import PORT
from .finding import Asked, Finding, said

FARTHEST = 3.0  # seconds that a connection may take


def check_port(asked: Asked) -> Finding:
    """Ports for metrics, one a process of this host."""
    from ..monitor.ports import port_holder

    ports = range(asked.port, asked.port + asked.local_world)
    why = "Prometheus and `gristmill status` ask a run there; a run that finds it taken takes another one"
    shown = f"{asked.port}" if len(ports) == 1 else f"{ports[0]} to {ports[-1]}"
    taken: dict[int, str] = {}
    refused = ""
    for port in ports:
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                taken[port] = port_holder(port) or "somebody whom this user may not see"
            else:
                refused = said(error)
        except OverflowError:
            refused = "there is no such port"
    figures = {"ports": list(ports), "taken": taken}
    if refused:
        remedy = "choose another with metrics.port=NUMBER, or go without with metrics.port=off"
        return Finding("port", "warn", f"{shown} may not be opened: {refused}", why, remedy, figures)
    if taken:
        found = "; ".join(f"{port} is taken by {holder}" for port, holder in taken.items())
        remedy = "end it if it is a run of old, or choose others with metrics.port=NUMBER (0: any free one)"
        return Finding("port", "warn", found, why, remedy, figures)
    return Finding("port", "ok", f"{shown} free", why, "", figures)


def check_name(asked: Asked, name: str | None = None) -> Finding:
    """Whether this host's name has an address, and one that others can reach. name: in place of the host's."""
    name = socket.gethostname() if name is None else name
    several = asked.grouped or bool(asked.peers)
    why = "gloo gives that address to the other ranks"
    network = "set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the network's device, as `ip addr` names it"
    begin = time.perf_counter()
    try:
        addresses = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None)})
    except (OSError, UnicodeError) as error:
        remedy = f"add the name to /etc/hosts (`127.0.1.1 {name}`)" + (f", or {network}" if several else "")
        return Finding("host name", "warn", f"{name} does not resolve ({said(error)})", why, remedy, {"name": name})
    seconds = time.perf_counter() - begin
    found = f"{name} is {', '.join(addresses[:3])}, in {1000 * seconds:.2g} ms"
    figures = {"name": name, "addresses": addresses, "seconds": seconds}
    local = all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    if local and several and not chosen:
        return Finding("host name", "warn", f"{found}, which only this host reaches", why, network, figures)
    if seconds > 1:
        return Finding("host name", "warn", found, why, f"add {name} to /etc/hosts: the name server is slow", figures)
    return Finding("host name", "ok", found + (f"; GLOO_SOCKET_IFNAME={chosen}" if chosen else ""), why, "", figures)


def check_peers(asked: Asked) -> Finding:
    """Hosts of --peers: names resolve, packets arrive. Refused is reached: nobody listens there before a run."""
    why = "ranks connect to each other, at ports that the system chooses"
    if not asked.peers:
        return Finding("peers", "skipped", "not asked", why, "name other hosts with --peers HOST[:PORT],...")
    answers: dict[str, tuple[bool, str]] = {}

    def ask(peer: str) -> None:
        answers[peer] = _reach(peer)

    threads = [threading.Thread(target=ask, args=(peer,), daemon=True) for peer in asked.peers]
    until = time.monotonic() + 2 * FARTHEST
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    told = {peer: answers.get(peer, (False, "no answer")) for peer in asked.peers}
    lost = [f"{peer}: {text}" for peer, (good, text) in told.items() if not good]
    figures = {peer: text for peer, (_, text) in told.items()}
    if lost:
        remedy = "mend the name, start the host, or open its firewall for this one, all ports"
        return Finding("peers", "bad", "; ".join(lost), why, remedy, figures)
    return Finding("peers", "ok", "; ".join(f"{peer}: {text}" for peer, (_, text) in told.items()), why, "", figures)


def _reach(peer: str) -> tuple[bool, str]:
    host, port = split(peer)
    begin = time.perf_counter()
    try:
        socket.create_connection((host, port), timeout=FARTHEST).close()
    except ConnectionRefusedError:
        return True, f"reached in {1000 * (time.perf_counter() - begin):.2g} ms, nobody listens at {port}"
    except socket.gaierror as error:
        return False, f"the name does not resolve ({error.strerror})"
    except TimeoutError:
        return False, f"does not answer at port {port} within {FARTHEST:.0f} s"
    except (OSError, OverflowError, UnicodeError) as error:
        return False, said(error)
    return True, f"connected in {1000 * (time.perf_counter() - begin):.2g} ms"


def split(peer: str) -> tuple[str, int]:
    """HOST, HOST:PORT, [IPV6]:PORT or IPV6."""
    if peer.startswith("["):
        host, _, port = peer[1:].partition("]")
        port = port.removeprefix(":")
    elif peer.count(":") > 1:
        host, port = peer, ""
    else:
        host, _, port = peer.partition(":")
    return host, int(port) if port.isdecimal() else int(os.environ.get("MASTER_PORT", "") or PORT)
