"""One request to a member's front (HTTPS), for programs that join or renew: synchronous, small, the standard library's.

Whatever address is dialled, the certificate must be of the fleet's authority and for slum.internal. Before that authority is
known there is one question only, ``authority_at``, and nothing secret is in it.
"""

from __future__ import annotations

import http.client
import socket
import ssl
from typing import TypeVar

import msgspec

from slum import api
from slum.answers import decode, problem_of
from slum.errors import ConfigError, SlumError, Unreachable
from slum.node.home import NAME, address_of

ANSWER_BYTES_MAX = 1 << 20
WRONG_TIME = (9, 10)
"""X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED."""
T = TypeVar("T")


class Stranger(ConfigError):
    """What answers there is not of the fleet that was meant; it has been told nothing."""


def authority_at(url: str, *, timeout_s: float) -> api.Authority:
    """Return what *url* says its authority is. Anybody may answer: believe it only when its hash is known."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return ask(url, "GET", "/v1/ca", kind=api.Authority, tls=context, timeout_s=timeout_s)


def ask(
    url: str, method: str, path: str, *, kind: type[T], tls: ssl.SSLContext, timeout_s: float, body: object = None
) -> T:
    """Return the answer; Unreachable when there is none, Stranger for a wrong certificate, else the member's own error."""
    host, port = address_of(url)
    connection = _Connection(host, port, tls, timeout_s)
    try:
        data = None if body is None else msgspec.json.encode(body)
        connection.request(method, path, body=data, headers={"Host": NAME, "Content-Type": "application/json"})
        answer = connection.getresponse()
        said = answer.read(ANSWER_BYTES_MAX)
    except ssl.SSLCertVerificationError as error:
        raise _stranger(url, error) from error
    except (OSError, http.client.HTTPException) as error:
        why = f"{url} does not answer: {getattr(error, 'strerror', None) or error}"
        raise Unreachable(why, hint="look at the address, and whether a firewall lets this machine reach it") from error
    finally:
        connection.close()
    if answer.status >= 400:
        raise _problem(url, answer.status, said)
    return decode(said, kind)


def _problem(url: str, status: int, said: bytes) -> SlumError:
    """Return what *status* stands for; a front whose server is away answers 502 to 504, which passes."""
    if status in (502, 504) or (status == 503 and not said):
        return Unreachable(f"{url} answers {status}: its server is away")
    return problem_of(status, said)


def _stranger(url: str, error: ssl.SSLCertVerificationError) -> SlumError:
    if error.verify_code in WRONG_TIME:
        hint = "set this machine's clock, or look at that of the member"
        return Unreachable(f"{url}: its certificate is not valid at this machine's time", hint=hint)
    return Stranger(f"{url} is no member of this fleet: {error.verify_message}", hint="look at the address")


class _Connection(http.client.HTTPConnection):
    """HTTP over TLS with slum.internal for a name, whatever the address."""

    def __init__(self, host: str, port: int, tls: ssl.SSLContext, timeout_s: float) -> None:
        super().__init__(host, port, timeout=timeout_s)
        self._tls = tls

    def connect(self) -> None:
        plain = socket.create_connection((self.host, self.port), self.timeout)
        try:
            self.sock = self._tls.wrap_socket(plain, server_hostname=NAME)
        except BaseException:
            plain.close()
            raise
