"""A test service: answers "VERSION pid", misbehaves as its environment says. Standard library only, quick to start."""

import os
import signal
import socket
import sys
import threading
import time

VERSION = os.environ.get("VERSION", "?")
if os.environ.get("FAIL"):
    print("cannot start:", os.environ["FAIL"], flush=True)
    sys.exit(2)
time.sleep(float(os.environ.get("SLOW", 0)))
if os.environ.get("LISTEN_FDS"):
    server = socket.socket(fileno=3)
elif os.environ.get("PORT"):
    server = socket.create_server(("127.0.0.1", int(os.environ["PORT"])))
else:
    server = socket.socket(socket.AF_UNIX)
    server.bind(os.environ["SOCKET_PATH"])
    server.listen(128)
signal.signal(signal.SIGTERM, signal.SIG_IGN if os.environ.get("STUBBORN") else lambda *_: os._exit(0))
print("serving", VERSION, flush=True)


def answer(peer):
    with peer:
        data = b""
        while b"\r\n\r\n" not in data:
            part = peer.recv(65536)
            if not part:
                return
            data += part
        path = data.split()[1].decode()
        status, body = "200 OK", f"{VERSION} {os.getpid()}"
        if path == "/healthz":
            body = "well"
            if os.path.exists(os.path.expanduser("~/sick")):
                status, body = "503 Service Unavailable", "database is locked"
        elif path == "/env":
            body = "\n".join(f"{k}={v}" for k, v in sorted(os.environ.items()))
        elif path == "/crash":
            os._exit(3)
        elif path.startswith("/slow"):
            time.sleep(float(path.rpartition("/")[2]))
        peer.sendall(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())


while True:
    peer, _ = server.accept()
    threading.Thread(target=answer, args=(peer,), daemon=True).start()
