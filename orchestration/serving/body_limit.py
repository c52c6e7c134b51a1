"""Bodies that are too long, whatever their header says of their length."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestration.serving.errors import Refused


class LimitBody:
    """Reads the whole (small) body, so that the answer doesn't depend on what the route does with it; then the route.

    Answers 413 as soon as the body turns out longer than `limit` bytes.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
            if size > self.limit:
                problem = Refused(413, f"the body is longer than {self.limit:,} bytes", code="body_too_long")
                return await problem.response(scope)(scope, receive, send)
        whole: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        return await self.app(scope, replay, send)
