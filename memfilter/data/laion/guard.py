"""What every process of img2dataset runs first: limits to what a server may do to it. `laion.download` puts this file, as
``sitecustomize.py``, on the path of its interpreters, whose environment has no memfilter: standard library only.

img2dataset's timeout is that of a single read: a server that sends a byte now and then holds a thread for ever, and one
that never stops fills the memory (img2dataset's issue 437). Here an answer has an end in time and size, redirections
stay with http(s), and addresses that are not public, such as those of a cluster's own services, are not spoken to.
"""

import fcntl
import http.client
import io
import ipaddress
import os
import time
import urllib.parse
import urllib.request

SECONDS = float(os.environ.get("MEMFILTER_MAX_SECONDS", "60"))
MEGABYTES = float(os.environ.get("MEMFILTER_MAX_MEGABYTES", "64"))
PUBLIC_ONLY = os.environ.get("MEMFILTER_PRIVATE_ADDRESSES") != "1"
TOO_LARGE = f"larger than {MEGABYTES:g} MB"


class LimitedReader(io.RawIOBase):
    def __init__(self, raw):
        self.raw, self.end, self.left = raw, time.monotonic() + SECONDS, MEGABYTES * 1e6

    def readable(self):
        return True

    def readinto(self, buffer):
        if time.monotonic() > self.end:
            raise TimeoutError(f"longer than {SECONDS:g} s")
        count = self.raw.readinto(buffer)
        self.left -= count or 0
        if self.left < 0:
            raise OSError(TOO_LARGE)
        return count

    def close(self):
        self.raw.close()
        super().close()


class LimitedResponse(http.client.HTTPResponse):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fp = io.BufferedReader(LimitedReader(self.fp.detach()), 1 << 16)

    def begin(self):
        super().begin()
        if self.length is not None and self.length > MEGABYTES * 1e6:
            raise OSError(TOO_LARGE)


connect = http.client.HTTPConnection.connect


def proxies():
    """(host, port) of the proxies for http and https; not every address need go through one."""
    found, known = set(), urllib.request.getproxies()
    for address in filter(None, map(known.get, ("http", "https"))):
        proxy = urllib.parse.urlsplit(address if "//" in address else f"//{address}")
        found |= {(proxy.hostname, proxy.port or default) for default in (80, 443)}
    return found


def connect_to_public(connection):
    connect(connection)
    if (connection.host.lower(), connection.port) in proxies():
        return  # which has rules of its own
    address = ipaddress.ip_address(connection.sock.getpeername()[0].partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    if not address.is_global:
        connection.close()
        raise OSError("address is not public")


def install():
    http.client.HTTPConnection.response_class = LimitedResponse
    if PUBLIC_ONLY:
        http.client.HTTPConnection.connect = connect_to_public
    opener = urllib.request.OpenerDirector()
    for handler in ("Proxy", "Unknown", "HTTP", "HTTPS", "HTTPDefaultError", "HTTPRedirect"):  # no file, ftp, data
        opener.add_handler(getattr(urllib.request, handler + "Handler")())
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    urllib.request.install_opener(opener)


if __name__ == "sitecustomize":  # imported under its own name it changes nothing
    install()
    if "MEMFILTER_LOCK" in os.environ:  # held until this process ends: no other download writes to the same place
        lock = open(os.environ["MEMFILTER_LOCK"])
        fcntl.flock(lock, fcntl.LOCK_SH)
