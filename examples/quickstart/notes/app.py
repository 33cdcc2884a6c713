"""A notebook: GET / lists the notes, POST / adds the body as one. Standard library only."""

import html
import os
import socketserver
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

DB = os.environ["NOTES_DB"]


@contextmanager
def database() -> Iterator[sqlite3.Connection]:
    db = sqlite3.connect(DB, timeout=5)
    try:
        with db:
            db.execute("CREATE TABLE IF NOT EXISTS notes (id INTEGER PRIMARY KEY, text TEXT NOT NULL)")
            yield db
    finally:
        db.close()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/healthz":
            self.answer(200, "ok\n", "text/plain")
            return
        with database() as db:
            rows = db.execute("SELECT text FROM notes ORDER BY id DESC LIMIT 100").fetchall()
        items = "".join(f"<li>{html.escape(text)}</li>" for (text,) in rows) or "<li><em>nothing yet</em></li>"
        self.answer(200, f"<!doctype html><title>notes</title><h1>notes</h1><ul>{items}</ul>\n", "text/html")

    def do_POST(self) -> None:
        size = min(int(self.headers.get("Content-Length") or 0), 10_000)
        text = self.rfile.read(size).decode("utf-8", "replace").strip()
        if not text:
            self.answer(400, "send the note as the body: curl -d 'buy milk' ...\n", "text/plain")
            return
        with database() as db:
            db.execute("INSERT INTO notes (text) VALUES (?)", (text,))
        self.answer(201, "noted\n", "text/plain")

    def answer(self, status: int, body: str, kind: str) -> None:
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        print(format % args, flush=True)

    def address_string(self) -> str:
        return "router"


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


print(f"notes in {DB}", flush=True)
Server(os.environ["SOCKET_PATH"], Handler).serve_forever()
