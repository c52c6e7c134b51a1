"""Who may come in: the key of a request, and how many requests its owner has made.

Everything below /v1 is behind it; health, description and page are open.
"""

from starlette._utils import get_route_path
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from orchestration.serving.access_log import note
from orchestration.serving.errors import Refused
from orchestration.serving.keys import Keys
from orchestration.serving.rates import Rates


class Gate:
    """Answers 401 without a key that is known, 429 above the rate of requests.

    keys: None lets everybody in; the address stands for the client then.
    """

    def __init__(self, app: ASGIApp, keys: Keys | None, rates: Rates) -> None:
        self.app, self.keys, self.rates = app, keys, rates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The path as the routes see it: the application may be mounted below another one's.
        if scope["type"] != "http" or not get_route_path(scope).startswith("/v1/"):
            return await self.app(scope, receive, send)
        try:
            who = scope["state"]["who"] = self._who(scope)
            scope["state"]["headers"].update(await self.rates.take(who, "requests", 1))
        except Refused as problem:
            return await problem.response(scope)(scope, receive, send)
        return await self.app(scope, receive, send)

    def _who(self, scope: Scope) -> str:
        client = scope.get("client")
        if self.keys is None:
            return f"address:{client[0] if client else 'unknown'}"
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        name = self.keys.name_of(key.strip()) if kind.lower() == "bearer" else None
        if name is None:
            what = "this key is not known" if key else "an API key is needed: the header 'Authorization: Bearer KEY'"
            raise Refused(401, what, code="invalid_api_key", headers={"www-authenticate": 'Bearer realm="md4"'})
        note(scope, key=name)
        return f"key:{name}"
