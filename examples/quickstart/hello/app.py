"""The smallest ASGI app: says who it is and counts its answers."""

import os

answers = 0


async def app(scope, receive, send):
    global answers
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    answers += 1
    service, instance = os.environ["SLUM_SERVICE"], os.environ["SLUM_INSTANCE"]
    body = f"hello from {service}/{instance}, pid {os.getpid()} in its own namespace, answer {answers}\n".encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
