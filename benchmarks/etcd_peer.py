"""The peer of the ledger's benchmarks: three members of Debian's etcd with TLS and fsync, and what asks them.

Throughput is driven by h2load (nghttp2), gRPC frames made once: a generator in C, so that it does not hold etcd back. What
needs an answer's meaning goes through etcd's own JSON gateway.
"""

from __future__ import annotations

import base64
import datetime
import http.client
import ipaddress
import json
import shutil
import socket
import ssl
import struct
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

VALUE = b"v" * 100


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Etcd:
    """*count* members on loopback. *options* are etcd's own: election timeouts, say."""

    def __init__(self, *options: str, count: int = 3) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="slum-etcd-"))
        self.options = options
        _certificate(self.base)
        self.clients = [free_port() for _ in range(count)]
        self.peers = [free_port() for _ in range(count)]
        self.running: list[subprocess.Popen[bytes] | None] = [None] * count
        self.context = ssl.create_default_context(cafile=str(self.base / "tls.crt"))

    def __enter__(self) -> Etcd:
        for number in range(len(self.clients)):
            self.start(number)
        self.leader()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in range(len(self.running)):
            self.kill(number)
        shutil.rmtree(self.base)

    def start(self, number: int) -> None:
        name, crt, key = f"e{number}", str(self.base / "tls.crt"), str(self.base / "tls.key")
        cluster = ",".join(f"e{n}=https://127.0.0.1:{port}" for n, port in enumerate(self.peers))
        argv = ["etcd", "--name", name, "--data-dir", str(self.base / name), "--logger=zap", "--log-level=error"]
        argv += [f"--listen-client-urls=https://127.0.0.1:{self.clients[number]}"]
        argv += [f"--advertise-client-urls=https://127.0.0.1:{self.clients[number]}"]
        argv += [f"--listen-peer-urls=https://127.0.0.1:{self.peers[number]}"]
        argv += [f"--initial-advertise-peer-urls=https://127.0.0.1:{self.peers[number]}"]
        argv += [f"--initial-cluster={cluster}", "--initial-cluster-state=new"]
        argv += [f"--cert-file={crt}", f"--key-file={key}"]
        argv += [f"--peer-cert-file={crt}", f"--peer-key-file={key}", f"--peer-trusted-ca-file={crt}"]
        argv += ["--peer-client-cert-auth", *self.options]
        with (self.base / f"{name}.log").open("ab") as log:
            self.running[number] = subprocess.Popen(argv, stdout=log, stderr=log)

    def kill(self, number: int) -> None:
        process = self.running[number]
        if process is not None:
            process.kill()
            process.wait()
            self.running[number] = None

    def pids(self) -> list[int]:
        return [process.pid for process in self.running if process is not None]

    def alive(self) -> list[int]:
        return [number for number, process in enumerate(self.running) if process is not None]

    def ask(self, number: int, path: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Return what member *number* answers; OSError or HTTPException when it does not, or not with 200."""
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self.clients[number], timeout=timeout_s, context=self.context
        )
        try:
            connection.request("POST", path, body=json.dumps(body), headers={"Content-Type": "application/json"})
            answer = connection.getresponse()
            data = answer.read()
            if answer.status != 200:
                raise http.client.HTTPException(data.decode(errors="replace"))
            found: dict[str, Any] = json.loads(data)
            return found
        finally:
            connection.close()

    def put(self, number: int, timeout_s: float) -> None:
        pair = {"key": base64.b64encode(b"k").decode(), "value": base64.b64encode(VALUE).decode()}
        self.ask(number, "/v3/kv/put", pair, timeout_s)

    def leader(self, deadline_s: float = 30.0) -> int:
        """Return which member leads, once all that run agree."""
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            try:
                told = {number: self.ask(number, "/v3/maintenance/status", {}, 1.0) for number in self.alive()}
            except (OSError, http.client.HTTPException):
                time.sleep(0.05)
                continue
            leads = {status.get("leader", "0") for status in told.values()}
            for number, status in told.items():
                if len(leads) == 1 and status["header"]["member_id"] in leads:
                    return number
            time.sleep(0.05)
        raise TimeoutError("etcd has no leader")

    def revision(self) -> int:
        return int(self.ask(self.leader(), "/v3/maintenance/status", {}, 5.0)["header"]["revision"])

    def load(self, clients: int, seconds: int) -> dict[str, float]:
        """Return writes a second and latencies in seconds, as h2load made and counted them at the leader."""
        request = b"\n\x01k\x12" + bytes([len(VALUE)]) + VALUE
        (self.base / "put").write_bytes(b"\0" + struct.pack(">I", len(request)) + request)
        log = self.base / "h2load.log"
        log.unlink(missing_ok=True)
        streams = min(clients, 16)
        argv = [
            "h2load",
            "-t1",
            f"-c{clients // streams}",
            f"-m{streams}",
            f"-D{seconds}",
            "-d",
            str(self.base / "put"),
        ]
        argv += ["-H", "content-type: application/grpc", "-H", "te: trailers", f"--log-file={log}"]
        before = self.revision()
        subprocess.run(
            [*argv, f"https://127.0.0.1:{self.clients[self.leader()]}/etcdserverpb.KV/Put"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        done = self.revision() - before
        took = sorted(int(line.split("\t")[2]) / 1e6 for line in log.read_text().splitlines())
        return {"per_s": done / seconds, **percentiles(took)}


def percentiles(took: list[float]) -> dict[str, float]:
    """Return median, p99 and p99.9 of *took*, which is sorted."""
    return {
        name: took[min(len(took) - 1, int(len(took) * q))] for name, q in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999))
    }


def _certificate(folder: Path) -> None:
    """Write a key and a certificate that signs itself, for every role here."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "etcd")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "tls.key").write_bytes(private)
    (folder / "tls.crt").write_bytes(certificate.public_bytes(pem))
