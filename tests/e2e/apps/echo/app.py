"""The test service: answers with its VERSION and pid, and misbehaves on request."""

import os
import signal
import socket
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path, _, query = self.path.partition("?")
        if path == "/healthz":
            sick = "SICK" in os.environ and os.path.exists(os.environ["SICK"])
            return self.answer(500 if sick else 200, "health\n")
        if path == "/crash":
            os._exit(3)
        if path == "/slow":
            time.sleep(float(query or 1))
        if path == "/env":
            return self.answer(200, "\n".join(f"{k}={v}" for k, v in sorted(os.environ.items())))
        if path == "/eat":
            hoard = []
            while True:
                hoard.append(bytearray(b"x" * (8 << 20)))
        if path == "/fork":
            return self.answer(200, str(fork_bomb()))
        if path == "/spam":
            line = b"s" * 1023 + b"\n"
            for _ in range(int(query)):
                os.write(1, line * 64)
            return self.answer(200, "spammed\n")
        if path == "/plant":
            own = os.environ["SOCKET_PATH"]
            os.unlink(own)
            os.symlink(query, own)
            return self.answer(200, "planted\n")
        self.answer(200, f"{os.environ.get('VERSION', '?')} {os.getpid()}\n")
        return None

    def answer(self, status, body):
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format, *args):
        if "healthz" not in self.path:
            print(format % args, flush=True)

    def address_string(self):
        return "router"


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 128


def fork_bomb():
    """Fork until refused; returns how many children there were."""
    children = []
    try:
        while len(children) < 5000:
            pid = os.fork()
            if pid == 0:
                signal.pause()
            children.append(pid)
    except OSError:
        pass
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return len(children)


def serve():
    if os.environ.get("FAIL_START"):
        print("cannot start: " + os.environ["FAIL_START"], flush=True)
        sys.exit(2)
    if os.environ.get("LISTEN_FDS"):
        assert int(os.environ["LISTEN_PID"]) == os.getpid(), os.environ["LISTEN_PID"]
        server = Server(os.environ["SOCKET_PATH"], Handler, bind_and_activate=False)
        server.socket.close()
        server.socket = socket.socket(fileno=3)
    else:
        server = Server(os.environ["SOCKET_PATH"], Handler)

    def stop(*_):
        threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, stop)
    print("serving", os.environ.get("VERSION", "?"), flush=True)
    server.serve_forever(0.05)


serve()
