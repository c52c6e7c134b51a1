"""A real HTTP server before a cluster's dashboard, as an ingress with a token of its own. It can be shut, and its token
be changed, while connections are open."""

import asyncio
import threading
from typing import Any

import aiohttp
from aiohttp import web


class Door:
    """Use as a context. Who has its token is let through, with the cluster's."""

    def __init__(self, address: str, cluster_token: str, token: str):
        self._address, self._cluster_token = address, cluster_token
        self.token = token
        self.refused = 0
        self._open = True
        self._connections: set[Any] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._end = asyncio.Event()

    def __enter__(self) -> "Door":
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(20)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def shut(self) -> None:
        """Cut all connections, and refuse new ones without an answer."""
        self._open = False
        self._loop.call_soon_threadsafe(self._cut)

    def open(self) -> None:
        self._open = True

    def rotate(self, token: str) -> None:
        """Another token from now on; open connections are cut."""
        self.token = token
        self._loop.call_soon_threadsafe(self._cut)

    def _cut(self) -> None:
        for transport in list(self._connections):
            transport.abort()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", self._pass)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port: int = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        self._session = aiohttp.ClientSession(headers={"Authorization": f"Bearer {self._cluster_token}"})
        self._ready.set()
        await self._end.wait()
        self._cut()
        await self._session.close()
        await runner.cleanup()

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        transport = request.transport
        assert transport is not None
        if not self._open:
            transport.abort()
            return web.Response(status=503)
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            self.refused += 1
            return web.Response(status=403, text="Forbidden: Invalid authentication token")
        self._connections.add(transport)
        try:
            url = f"{self._address}{request.path_qs}"
            if request.headers.get("Upgrade", "").lower() == "websocket":
                return await self._pass_socket(request, url)
            async with self._session.request(request.method, url, data=await request.read()) as answer:
                kind = answer.headers.get("Content-Type", "text/plain").partition(";")[0]
                return web.Response(status=answer.status, body=await answer.read(), content_type=kind)
        finally:
            self._connections.discard(transport)

    async def _pass_socket(self, request: web.Request, url: str) -> web.StreamResponse:
        ours = web.WebSocketResponse()
        await ours.prepare(request)
        async with self._session.ws_connect(url, max_msg_size=0) as theirs:
            async for message in theirs:
                await ours.send_str(message.data)
        await ours.close()
        return ours
