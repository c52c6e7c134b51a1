"""The files of the page as a browser is sent them."""

import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from orchestration.serving import page

FOLDER = Path(page.__file__).parent
FILES = sorted(file.name for file in FOLDER.iterdir() if file.suffix not in (".py", "") and file.name != "index.html")


@pytest.fixture(scope="module")
def client():
    api = FastAPI()
    api.include_router(page.router)
    return TestClient(api)


@pytest.mark.parametrize("address", ["/", *(f"/page/{name}" for name in FILES)])
def test_every_file_has_its_type_and_may_use_nothing_from_elsewhere(client, address):
    response = client.get(address)
    kinds = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", "": "text/html"}
    assert response.status_code == 200
    assert response.headers["content-type"].startswith(kinds[Path(address).suffix])
    assert response.headers["x-content-type-options"] == "nosniff"
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", response.text)
    assert client.head(address).status_code == 200


def test_what_the_browser_has_is_not_sent_again(client):
    first = client.get("/page/page.js")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/page/page.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/page/page.js", headers={"if-none-match": '"another"'}).status_code == 200


@pytest.mark.parametrize(
    "name",
    ["__init__.py", "none.js", "", "..%2fpage%2findex.html", "..%2Fapp.py", "%00.js", "x" * 300 + ".js", "page.js/"],
)
def test_nothing_else_is_sent(client, name):
    assert client.get(f"/page/{name}", follow_redirects=False).status_code in (404, 307)
    assert client.post("/page/page.js").status_code == 405


def test_what_the_files_name_is_there(client):
    found = re.findall(r'(?:href|src)="(page/[^"]+)"', client.get("/").text)
    for name in FILES:
        if name.endswith(".js"):
            imports = re.findall(r'from "\./([^"]+)"', (FOLDER / name).read_text("utf-8"))
            found += [f"page/{imported}" for imported in imports]
    assert {f"page/{name}" for name in FILES} == set(found)


def test_every_element_that_a_script_asks_for_is_on_the_page(client):
    ids = set(re.findall(r'\bid="([^"]+)"', client.get("/").text))
    for name in FILES:
        asked = set(re.findall(r'\$\("([a-z-]+)"\)', (FOLDER / name).read_text("utf-8")))
        assert asked <= ids, name
