"""The page at `/`: plain files, sent as they lie here, that use the HTTP interface as any other client does.

Nothing on the page comes from elsewhere, and its Content-Security-Policy holds it to that.
"""

from pathlib import Path

from fastapi import APIRouter, HTTPException, Request, Response
from starlette.staticfiles import StaticFiles

_FOLDER = Path(__file__).parent
# Not the machine's own table of types, which may say something else.
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # Kept by the browser, but asked for anew (by its ETag) each time: a new version is seen at once.
    "cache-control": "no-cache",
}

router = APIRouter(include_in_schema=False)
_files = StaticFiles(directory=_FOLDER)
_names = {file.name: _TYPES[file.suffix] for file in _FOLDER.iterdir() if file.suffix in _TYPES}


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    """The page itself."""
    return await _send("index.html", request)


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
async def part(name: str, request: Request) -> Response:
    """A file of the page; 404 for what is none."""
    return await _send(name, request)


async def _send(name: str, request: Request) -> Response:
    if name not in _names:
        raise HTTPException(404)
    response = await _files.get_response(name, request.scope)  # 304 if the browser has it
    response.headers.update(_HEADERS)
    response.headers["content-type"] = _names[name]
    return response
