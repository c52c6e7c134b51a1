"""The page in a real browser, over a real server and small real models."""

import base64
import hashlib
import io
import json
import os
import re
import shutil
from dataclasses import dataclass

import httpx
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import BrowserContext, Locator, Page, expect, sync_playwright

from orchestration.serving import page as page_files
from orchestration.serving.engine import Engine
from orchestration.serving.events import Begun, Step, played
from orchestration.serving.models import Local
from tests.orchestration.serving.conftest import CONFIG, serving, wait_until

CHROMIUM = os.environ.get("MD4_CHROMIUM") or shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: `apt-get install chromium`, or its path in MD4_CHROMIUM"
)
WAIT_MS = 30_000  # on a busy machine
LEVELS = 17
SIDE = 8  # of the images of "digits"


@dataclass(frozen=True)
class Service:
    url: str
    engines: dict[str, Engine]

    def ask(self, **body) -> dict:
        response = httpx.post(f"{self.url}/v1/samples", json=body, timeout=60)
        assert response.status_code == 200, response.text
        return response.json()

    def watch(self, **body) -> tuple[Begun, list[Step]]:
        """What a watched request begins with, and its steps."""
        text = httpx.post(f"{self.url}/v1/samples", json={**body, "stream": True}, timeout=60).text
        data = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
        assert data[-1]["type"] == "done"
        return Begun(**data[0]), [Step(**one) for one in data[1:-1]]


@pytest.fixture(scope="module")
def service(engines):
    with serving(Local(engines), CONFIG, [page_files.router]) as server:
        yield Service(server.url, engines)


@pytest.fixture(scope="module")
def chromium(service):
    with sync_playwright() as playwright:
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if root else [])
        yield browser
        browser.close()


@pytest.fixture
def context(chromium):
    context = chromium.new_context(permissions=["clipboard-read", "clipboard-write"])
    context.set_default_timeout(WAIT_MS)
    expect.set_options(timeout=WAIT_MS)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, service):
    """The page, open. At the end nothing may have gone wrong unseen, and nothing have come from elsewhere."""
    complaints, asked = [], []
    page = context.new_page()
    page.on("console", lambda said: complaints.extend([said.text] if said.type in ("error", "warning") else []))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(service.url)
    expect(page.get_by_label("Steps", exact=True)).to_be_visible()
    yield page
    refused = "Failed to load resource: the server responded with a status of 422"
    assert [text for text in complaints if not text.startswith(refused)] == []
    assert [url for url in asked if not url.startswith(service.url)] == []


def tab_to(page: Page, name: str) -> None:
    """Press Tab until the element with this id has the focus."""
    for _ in range(80):
        if page.evaluate("document.activeElement.id") == name:
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{name} is not reached with Tab")


def done(page: Page) -> None:
    expect(page.locator("#status")).to_contain_text("Done")


def sampled(page: Page, **fields: object) -> None:
    """Fill fields by their labels, sample, and wait for the end."""
    for label, value in fields.items():
        page.get_by_label(label, exact=True).fill(str(value))
    page.get_by_role("button", name="Sample", exact=True).click()
    done(page)


def cells(page: Page) -> list[list[tuple[str, str]]]:
    """Class and words of each token of each sample."""
    found = page.evaluate(
        "[...document.querySelectorAll('.tokens')].map(one => [...one.children].map(c => [c.className, c.textContent]))"
    )
    return [[(kind, text) for kind, text in sample] for sample in found]


def words(sample: list[tuple[str, str]]) -> str:
    return "".join("_" if "hidden" in kind else text for kind, text in sample)


def go_to(page: Page, calls: int) -> None:
    """Show the moment after so many network calls."""
    page.locator("#time").fill(str(calls))
    expect(page.locator("#moment")).to_contain_text(f"After {calls} of" if calls else "Before the first")


def levels(picture: Locator) -> np.ndarray:
    """The levels `[64]` that a canvas of grey pixels shows; -1 where a pixel is not grey, but striped."""
    shown = base64.b64decode(picture.evaluate("canvas => canvas.toDataURL('image/png')").partition(",")[2])
    image = np.asarray(Image.open(io.BytesIO(shown)).convert("RGB")).astype(int)
    side = image.shape[0] // SIDE
    centres = image[side // 2 :: side, side // 2 :: side]
    grey = (centres == centres[..., :1]).all(axis=-1)
    return np.where(grey, np.rint(centres[..., 0] * (LEVELS - 1) / 255), -1).astype(int).reshape(-1)


def numbers(text: str) -> np.ndarray:
    return np.array([int(level) for level in text.split()])


def test_holes_are_filled_and_read_with_the_keyboard_alone(page, service):
    tab_to(page, "prompt")
    page.keyboard.type("the _{3} of ____")
    for field, text in {"set-steps": "9", "seed": "11", "count": "3"}.items():
        tab_to(page, field)
        page.keyboard.press("Control+A")
        page.keyboard.type(text)
    tab_to(page, "run")
    page.keyboard.press("Enter")
    done(page)
    expected = service.ask(model="small", prompt="the ___ of ____", count=3, seed=11, sampling={"steps": 9})["samples"]
    texts = [one["text"] for one in expected]
    assert page.locator(".sample-text").all_text_contents() == texts
    assert [words(sample) for sample in cells(page)] == texts
    facts = page.locator("#run-facts").inner_text()
    assert "11 to 13" in facts
    assert service.engines["small"].describe("small").hash[:12] in facts
    # The focus is back where the next sample is asked for; from there the samples are reached.
    assert page.evaluate("document.activeElement.id") == "run"
    tab_to(page, "time")
    page.keyboard.press("Home")
    expect(page.locator("#moment")).to_contain_text("Before the first")
    assert {words(sample) for sample in cells(page)} == {"the ___ of ____".ljust(32, "_")}
    page.keyboard.press("End")
    total = max(one["calls"] for one in expected)
    expect(page.locator("#moment")).to_contain_text(f"After {total} of {total}")
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "Copy":
            break
    page.keyboard.press("Enter")
    expect(page.locator("#said")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == texts[0]


def test_every_moment_shows_what_the_calls_up_to_it_revealed(page, service):
    """In steps, and played."""
    sampled(page, **{"Text with holes": "a_c", "Seed": 5, "Samples": 2, "Steps": 12})
    body = {"model": "small", "prompt": "a_c", "seed": 5, "count": 2, "sampling": {"steps": 12}}
    samples = service.ask(**body, order=True)["samples"]
    total = max(one["calls"] for one in samples)
    page.locator("#time").press("Home")
    for calls in range(total + 1):
        expect(page.locator("#moment")).to_contain_text(f"After {calls} of {total}" if calls else "Before the first")
        for shown, one in zip(cells(page), samples, strict=True):
            assert words(shown) == "".join(
                letter if at < calls else "_" for letter, at in zip(one["text"], one["order"], strict=True)
            )
            now = [place for place, (kind, _) in enumerate(shown) if "now" in kind]
            assert now == [place for place, at in enumerate(one["order"]) if at == calls - 1 >= 0]
            assert {kind.split()[1] for kind, _ in shown[:3:2]} == {"given"}
        page.locator("#time").press("ArrowRight")
    assert page.locator("#time").get_attribute("aria-valuetext").startswith(f"After {total} of {total}")
    page.get_by_role("button", name="Play").click()
    page.get_by_role("button", name="Pause").click()
    before = int(page.locator("#time").input_value())
    assert before < total
    page.get_by_role("button", name="One call forward").click()
    assert int(page.locator("#time").input_value()) == before + 1
    go_to(page, total - 2)
    page.get_by_role("button", name="Play").click()
    expect(page.locator("#time")).to_have_value(str(total))
    expect(page.get_by_role("button", name="Play")).to_be_visible()


@pytest.mark.parametrize(
    ("sampler", "own"), [("remdm", {"steps": 14, "remask": "rescale", "eta": 0.6}), ("p2", {"steps": 14, "eta": 4})]
)
def test_what_is_masked_again_is_seen(page, service, sampler, own):
    page.get_by_label("Sampler", exact=True).select_option(sampler)
    page.get_by_text("More settings").click()
    expect(page.get_by_label("Grid", exact=True)).to_be_visible(visible=sampler == "remdm")
    page.get_by_label("Eta", exact=True).fill(str(own["eta"]))
    if sampler == "remdm":
        page.get_by_label("Remask", exact=True).select_option("rescale")
    sampled(page, Seed=3, Samples=2, Steps=14)
    begun, steps = service.watch(model="small", seed=3, count=2, sampling={"sampler": sampler, **own})
    assert sum(len(step.hidden) for step in steps) > 0
    total = max(step.call for step in steps) + 1
    for calls in range(total + 1):
        go_to(page, calls)
        expected = played(begun, [step for step in steps if step.call < calls])
        assert [words(sample) for sample in cells(page)] == [
            "".join("_" if piece is None else str(piece) for piece in one) for one in expected
        ]
        newest = {step.sample: step.hidden for step in steps if step.call == calls - 1}
        for index, sample in enumerate(cells(page)):
            again = [place for place, (kind, _) in enumerate(sample) if "again" in kind and "now" in kind]
            assert again == sorted(newest.get(index, []))
        hidden = sum(map(len, newest.values()))
        assert (f"{hidden} masked again" in page.locator("#moment").inner_text()) == (hidden > 0)


def test_a_request_is_cancelled_where_it_runs(page, service):
    engine = service.engines["slow"]
    before = engine.stats().cancelled
    page.locator("#model").select_option("slow")
    page.get_by_role("button", name="Sample", exact=True).click()
    expect(page.locator(".cell.revealed").first).to_be_visible()
    expect(page.get_by_role("button", name="Cancel")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_contain_text("Cancelled. Kept:")
    wait_until(lambda: (engine.stats().cancelled, engine.stats().rows_running) == (before + 1, 0))
    expect(page.get_by_role("button", name="Cancel")).to_be_hidden()
    assert page.locator(".card .cell.hidden").count() > 0
    sampled(page, Seed=1, Samples=1, Steps=4)
    assert page.locator(".card .cell.hidden").count() == 0


def test_what_the_service_refuses_is_said_in_its_words(page, service):
    steps = page.get_by_label("Steps", exact=True)
    steps.fill("0")
    page.get_by_role("button", name="Sample", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("sampling.steps=0: input should be greater than or equal to 1")
    expect(steps).to_have_attribute("aria-invalid", "true")
    steps.fill("many")
    steps.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("sampling.steps='many'")
    steps.fill("")
    # Here the stream has begun, and the error is one of its events.
    page.locator("#model").select_option("sick")
    page.get_by_role("button", name="Sample", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("NaN")
    page.locator("#model").select_option("small")
    sampled(page)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_only_hidden_pixels_change(page, service):
    page.locator("#model").select_option("digits")
    expect(page.locator("#editor-count")).to_have_text("64 of 64 hidden")
    sampled(page, Seed=4, Samples=1)
    given = numbers(service.ask(model="digits", seed=4)["samples"][0]["text"])
    assert (levels(page.locator(".picture")) == given).all()

    with page.expect_download() as saved:
        page.get_by_role("button", name="Save sample 1").click()
    assert saved.value.suggested_filename == "seed 4.png"
    picture = np.asarray(Image.open(saved.value.path()).convert("L")).astype(int)
    assert (np.rint(picture * (LEVELS - 1) / 255).reshape(-1) == given).all()

    page.get_by_role("button", name="Edit sample 1").click()
    expect(page.locator("#editor")).to_be_focused()
    assert (levels(page.locator("#editor")) == given).all()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "Space", "Shift+ArrowDown"):
        page.keyboard.press(key)
    expect(page.locator("#said")).to_have_text("row 3, column 3: hidden")
    for field, number in {"rect-x": 5, "rect-y": 4, "rect-w": 3, "rect-h": 4}.items():
        tab_to(page, field)
        page.keyboard.type(str(number))
    tab_to(page, "rect-apply")
    page.keyboard.press("Enter")
    hidden = np.zeros((SIDE, SIDE), bool)
    hidden[1:3, 2] = hidden[4:8, 5:8] = True
    expect(page.locator("#editor-count")).to_have_text("14 of 64 hidden")

    with page.expect_request("**/v1/samples") as sent:
        sampled(page, Seed=9, Samples=3)
    wanted = [None if hide else int(level) for hide, level in zip(hidden.reshape(-1), given, strict=True)]
    assert sent.value.post_data_json["pixels"] == wanted
    expected = service.ask(model="digits", seed=9, count=3, pixels=wanted)["samples"]
    for picture, one in zip(page.locator(".picture").all(), expected, strict=True):
        assert (levels(picture) == numbers(one["text"])).all()
        assert (levels(picture)[~hidden.reshape(-1)] == given[~hidden.reshape(-1)]).all()
    assert any((numbers(one["text"]) != given).any() for one in expected)
    go_to(page, 0)
    for picture in page.locator(".picture").all():
        assert ((levels(picture) == -1) == hidden.reshape(-1)).all()

    page.get_by_label("height", exact=True).fill("9")
    page.get_by_role("button", name="Apply the tool").click()
    expect(page.get_by_role("alert")).to_contain_text("must lie in the image")


def test_a_picture_is_opened_and_drawn_on(page):
    page.locator("#model").select_option("digits")
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    page.get_by_label("Open a picture").set_input_files(
        {"name": "digit.png", "mimeType": "image/png", "buffer": file.getvalue()}
    )
    expect(page.locator("#editor-count")).to_have_text("0 of 64 hidden")
    page.get_by_role("button", name="Sample", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("Nothing is hidden")
    box = page.locator("#editor").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 2, box["y"] + 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] - 2)  # in one leap
    page.mouse.up()
    expect(page.locator("#editor-count")).to_have_text("8 of 64 hidden")
    with page.expect_request("**/v1/samples") as sent:
        sampled(page, Samples=1)
    whole = pixels.astype(int) * LEVELS // 256
    assert sent.value.post_data_json["pixels"] == [
        None if x == y else int(whole[y, x]) for y in range(SIDE) for x in range(SIDE)
    ]
    page.get_by_label("Open a picture").set_input_files(
        {"name": "none.png", "mimeType": "image/png", "buffer": b"no picture"}
    )
    expect(page.get_by_role("alert")).to_contain_text("none.png is no picture")


@pytest.mark.parametrize("model", ["small", "digits"])
def test_fits_a_phone_and_is_accessible(page, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    page.set_viewport_size({"width": 360, "height": 740})
    page.locator("#model").select_option(model)
    page.get_by_text("More settings").click()
    sampled(page, Samples=2, Steps=8)
    page.locator("#time").press("ArrowLeft")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        found = Axe().run(page).response["violations"]
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []
        page.screenshot(path=folder / f"{model}-{scheme}.png", full_page=True)
    moving = "[...document.querySelectorAll('*')].filter(one => getComputedStyle(one).animationName !== 'none').length"
    assert page.evaluate(moving) == 0


def test_keys_and_rates_are_told_of(context, service, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"me: {hashlib.sha256(b'secret').hexdigest()}\n", encoding="utf-8")
    config = CONFIG.model_copy(update={"keys": keys, "tokens_per_minute": 40})
    with serving(Local(service.engines), config, [page_files.router]) as server:
        page = context.new_page()
        page.goto(server.url)
        expect(page.get_by_role("alert")).to_contain_text("API key is needed")
        expect(page.get_by_label("API key")).to_be_focused()
        page.keyboard.type("secret")
        page.keyboard.press("Tab")
        expect(page.get_by_role("alert")).to_be_hidden()
        sampled(page, Samples=1)
        page.get_by_role("button", name="Sample", exact=True).click()
        expect(page.get_by_role("alert")).to_contain_text(re.compile(r"^more than 40 tokens a minute.* in \d+ s$"))
        page.close()


def test_events_are_read_however_their_stream_is_cut(page):
    text = 'event: begun\ndata: {"a":\ndata: 1}\n\n: ping\n\nevent:step\r\ndata: ü🙂\r\n\r\n'
    text += "retry: 3\n\ndata: x\n\nevent: half"
    cut = """async (text) => {
        const { EventParser } = await import("/page/api.js");
        const results = new Set();
        const read = (pieces) => {
            const parser = new EventParser();
            results.add(JSON.stringify(pieces.flatMap((piece) => parser.push(piece))));
        };
        read([text]);
        read([...text]);
        for (let at = 0; at <= text.length; at++) read([text.slice(0, at), text.slice(at)]);
        return [...results];
    }"""
    (found,) = page.evaluate(cut, text)
    assert json.loads(found) == [
        {"type": "begun", "data": '{"a":\n1}'},
        {"type": "step", "data": "ü🙂"},
        {"type": "message", "data": "x"},
    ]


def test_the_command_to_copy_gives_the_same(page, service):
    page.get_by_label("Text with holes", exact=True).fill("it _{4} is")
    page.get_by_label("Seed", exact=True).fill("7")
    page.get_by_role("button", name="Copy as curl").click()
    expect(page.locator("#said")).to_have_text("Copied.")
    command = page.evaluate("navigator.clipboard.readText()")
    assert command.startswith(f"curl '{service.url}/v1/samples' ")
    found = re.fullmatch(r".* -d '(.*)'", command)
    assert found is not None
    body = json.loads(found[1])
    sampled(page)
    assert page.locator(".sample-text").all_text_contents() == [one["text"] for one in service.ask(**body)["samples"]]
