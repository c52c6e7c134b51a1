"""Infilling as its users meet it: holes and stop tokens in text, regions of images, and texts of any length."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from md4.errors import UserError
from md4.samplers import SamplingConfig
from orchestration.cli import main
from orchestration.infilling import read_holes
from orchestration.pictures import HIDDEN
from orchestration.runs import load_model
from orchestration.sampling import Request, prepare, sample
from pipelines.images import brightness
from tests.orchestration.small_run import LENGTH, write_run
from tests.orchestration.test_pictures import write_image_run
from tests.shared import shared


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A run on 8 x 8 images of 17 levels."""
    return write_image_run(tmp_path_factory.mktemp("images")).path


def md4(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["md4", *map(str, arguments)])
    try:
        main()
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_settings_on_the_command_line_are_those_of_the_library(text, monkeypatch, capsys):
    settings = ["sampler=first_hitting", "steps=6", "extrapolate=true", "top_k=9"]
    code, out, _ = md4(monkeypatch, capsys, "sample", text, *settings, "--seed", 4, "--count", 2, "--json")
    assert code == 0
    found = json.loads(out)
    chosen = SamplingConfig(sampler="first_hitting", steps=6, extrapolate=True, top_k=9)
    expected = sample(load_model(text), count=2, seed=4, settings=chosen)
    assert [one["text"] for one in found["samples"]] == [one.text for one in expected.samples]
    assert found["settings"] == json.loads(chosen.resolve("md4").model_dump_json())
    assert (found["mode"], found["network_calls"], found["draws"]) == ("exact", 6, 2 * LENGTH)
    assert json.loads((text / "samples" / "step-00000007-seed-4.json").read_text()) == found


def test_a_grid_from_a_file(text, tmp_path, monkeypatch, capsys):
    times = [1.0, 0.7, 0.2, 0.0]
    (tmp_path / "report.json").write_text(json.dumps({"kind": "grid", "times": times}))
    (tmp_path / "bare.json").write_text(json.dumps(times))
    answers = []
    for grid in (tmp_path / "report.json", tmp_path / "bare.json", times):
        code, out, _ = md4(monkeypatch, capsys, "sample", text, f"grid={grid}", "--seed", 1, "--json")
        assert code == 0
        answers.append(json.loads(out))
        assert answers[-1]["settings"]["grid"] == times
        assert answers[-1]["settings"]["steps"] == 3
    assert answers[0]["samples"] == answers[1]["samples"] == answers[2]["samples"]


def test_holes_of_several_tokens(text):
    loaded = load_model(text)
    canvases = [prepare(loaded, Request(prompt=p, length=12)).canvas for p in ("a_{4}b_c", "a____b_c")]
    assert canvases[0].tolist() == canvases[1].tolist() == [[0, 27, 27, 27, 27, 1, 27, 2, 27, 27, 27, 27]]


def test_a_stop_token_ends_the_text(text):
    loaded = load_model(text)
    found = sample(loaded, prompts=["e_{20}"], count=40, seed=3, stop="e", length=21)
    whole = sample(loaded, prompts=["e_{20}"], count=40, seed=3, length=21)
    assert {one.stopped for one in found.samples} == {True, False}
    for cut, one in zip(found.samples, whole.samples, strict=True):
        end = one.text.find("e", 1) + 1  # the first letter is the prompt's: it ends nothing
        assert cut.text == (one.text[:end] if end else one.text)
        assert cut.stopped == bool(end)
    assert found.stop == "e"
    assert {one.stopped for one in whole.samples} == {None}


def test_long_texts_need_blocks(text):
    loaded, length = load_model(text), 3 * LENGTH + 5
    prompt = "the " + "_" * LENGTH + " and "
    report = sample(loaded, prompts=[prompt], length=length, seed=1, settings=SamplingConfig(block=10, steps=6))
    written = report.samples[0].text
    assert len(written) == length
    assert written[:4] == "the "
    assert written[4 + LENGTH : 9 + LENGTH] == " and "
    assert "_" not in written
    with pytest.raises(UserError, match=r"rows of 101 tokens are longer than the 32 .* block=N"):
        sample(loaded, length=length)


def test_byte_pairs_have_holes_and_stops(tmp_path, monkeypatch):
    """GPT-2's vocabulary: known tokens stand around holes of several tokens, and a document's end ends a text."""
    monkeypatch.setenv("MD4_GPT2", str(shared("data", "gpt2-bpe")))
    loaded = load_model(write_run(tmp_path, "data.vocabulary=gpt2"))
    words = loaded.vocabulary
    prompt = r"The_{5} sat on a snake\_case_ mat."
    report = sample(loaded, prompts=[prompt], seed=1, length=24, settings=SamplingConfig(steps=4))
    canvas = prepare(loaded, Request(prompt=prompt, length=24)).canvas[0].numpy()
    known = canvas != words.size
    assert words.decode(canvas[known]) == "The sat on a snake_case mat."
    assert (~known[:6]).sum() == 5
    middle = words.decode(canvas[6 : np.flatnonzero(known)[-1] - 2])
    assert middle in report.samples[0].text
    for stop, token in (("<|endoftext|>", 50256), (".", 13), (" the", 262)):
        assert prepare(loaded, Request(stop=stop)).stop == token
    with pytest.raises(UserError, match=r"stop: 'two words' is 2 tokens of the vocabulary 'gpt2', not one"):
        prepare(loaded, Request(stop="two words"))


def picture(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def test_a_region_of_an_image_is_filled(images, tmp_path, monkeypatch, capsys):
    """Levels come back from the picture that shows them; only what is hidden changes, and a picture tells the story."""
    tokens = np.arange(64).reshape(8, 8) % 17
    given = picture(tmp_path / "given.png", brightness(tokens, 17))
    holes = ["--image", given, "--hide", "0,4,8,8", "--hide", "7,0,8,1"]
    code, out, err = md4(monkeypatch, capsys, "sample", images, *holes, "--count", 3, "--seed", 2, "--json")
    assert code == 0, err
    hidden = np.zeros((8, 8), bool)
    hidden[4:], hidden[0, 7] = True, True
    report = json.loads(out)
    filled = np.array([[int(level) for level in one["text"].split()] for one in report["samples"]]).reshape(3, 8, 8)
    assert (filled[:, ~hidden] == tokens[~hidden]).all()
    assert filled.max() <= 16
    assert any((one != tokens).any() for one in filled)
    canvas = np.where(hidden, -1, tokens).reshape(-1)
    assert report["prompts"][0] == " ".join("_" if level < 0 else str(level) for level in canvas)
    drawn = np.asarray(Image.open(images / "samples" / "step-00000003-seed-2.png").convert("RGB"))
    shown = (drawn == HIDDEN).all(axis=2)
    assert 0 < shown.mean() < 0.2
    again = sample(load_model(images), prompts=report["prompts"][:1], seed=3)
    assert again.samples[0].text == report["samples"][1]["text"]


def test_a_mask_says_what_is_filled(images, tmp_path):
    config = load_model(images).config
    given = picture(tmp_path / "given.png", np.full((8, 8), 200))
    white = np.zeros((8, 8))
    white[2:4, 5] = 255
    holes = read_holes(config, given, mask=picture(tmp_path / "mask.png", white))
    assert np.flatnonzero(holes.canvas == 17).tolist() == [21, 29]
    assert set(holes.given.tolist()) == {200 * 17 // 256}
    assert holes.notes == ""
    coloured = picture(tmp_path / "colour.png", np.full((8, 8, 3), 200))
    assert read_holes(config, coloured, ["0,0,1,1"]).notes == "RGB to L"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "absent.png", "--hide", "0,0,1,1"], "absent.png"),
        (
            ["--image", "small.png", "--hide", "0,0,1,1"],
            "is 5 high and 4 wide, but the model's images are 8",
        ),
        (["--image", "text.png", "--hide", "0,0,1,1"], "no image of a known format"),
        (["--image", "deep.png", "--hide", "0,0,1,1"], "more than 8 bits"),
        (["--image", "good.png"], "--hide x0,y0,x1,y1 or --mask"),
        (["--image", "good.png", "--hide", "0,0,9,1"], "0 <= x0 < x1 <= 8"),
        (["--image", "good.png", "--hide", "3,0,3,1"], "0 <= x0 < x1 <= 8"),
        (["--image", "good.png", "--hide", "-1,0,3,1"], "whole numbers"),
        (["--image", "good.png", "--hide", "1,2,3"], "whole numbers"),
        (["--image", "good.png", "--mask", "small.png"], "is 5 high and 4 wide"),
        (["--image", "good.png", "--mask", "good.png"], "no white pixel"),
        (["--hide", "0,0,1,1"], "name that, too"),
        (["--image", "good.png", "--hide", "0,0,1,1", "--prompt", "1 2"], "not both"),
        (["--prompt", "1 2 x"], "'x' at position 2 is no level"),
        (["--prompt", "1 17"], "'17' at position 1 is no level"),
        (["--prompt", "0 " * 65], "65 tokens, the canvas only 64"),
        (["--stop", "1"], "this model makes images"),
    ],
)
def test_images_that_cannot_be_filled_are_named(images, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "good.png", np.zeros((8, 8)))
    picture(tmp_path / "small.png", np.zeros((5, 4)))
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    code, _, err = md4(monkeypatch, capsys, "sample", images.resolve(), *options)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


def test_text_has_no_pixels(text, tmp_path, monkeypatch, capsys):
    given = picture(tmp_path / "given.png", np.zeros((8, 8)))
    code, _, err = md4(monkeypatch, capsys, "sample", text, "--image", given, "--hide", "0,0,1,1")
    assert code == 2
    assert "models text8, not images" in err
