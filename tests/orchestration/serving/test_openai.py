"""OpenAI's own client, unchanged, against the service."""

import base64
import io
import json

import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from md4.samplers import SamplingConfig
from orchestration.sampling import Answer, Request, answer, prepare
from tests.orchestration.small_run import LENGTH


@pytest.fixture(scope="module")
def ai(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def expected(loaded, **wish) -> list:
    """What the library writes."""
    request = Request(**{"settings": loaded.config.sampling, "literal": True, **wish})
    (found,) = answer(loaded, [request], [prepare(loaded, request)])
    assert isinstance(found, Answer)
    return found.samples


def test_lists_models(ai, runs):
    assert [model.id for model in ai.models.list()] == ["small", "pairs", "digits", "slow", "sick"]
    model = ai.models.retrieve("digits")
    assert (model.id, model.object, model.owned_by) == ("digits", "model", "md4")
    assert model.model_extra is not None
    assert model.model_extra["info"]["shape"] == [8, 8, 1]
    with pytest.raises(openai.NotFoundError, match="model 'x/y' is not served"):
        ai.models.retrieve("x/y")


def test_completes(ai, runs):
    found = ai.completions.create(model="small", prompt="the cat", max_tokens=9, n=3, seed=4)
    wanted = expected(runs["small"], prompt="the cat", fill=9, count=3, seed=4)
    assert [choice.text for choice in found.choices] == [one.text[7:] for one in wanted]
    assert len({choice.text for choice in found.choices}) > 1
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert {choice.finish_reason for choice in found.choices} == {"length"}
    assert all(len(choice.text) == 9 for choice in found.choices)
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (7, 27, 34)
    assert (found.object, found.model) == ("text_completion", "small")
    assert found.id == f"cmpl-{found._request_id}"
    for nothing in ("", None):
        assert len(ai.completions.create(model="small", prompt=nothing).choices[0].text) == 16


def test_fills_before_a_suffix(ai, runs):
    found = ai.completions.create(model="small", prompt="the ", suffix=" sat", max_tokens=5, seed=1)
    (wanted,) = expected(runs["small"], prompt="the _____ sat", length=13, seed=1, literal=False)
    assert found.choices[0].text == wanted.text[4:9]
    assert found.usage.prompt_tokens == 8
    echoed = ai.completions.create(model="small", prompt="the ", suffix=" sat", max_tokens=5, seed=1, echo=True)
    assert echoed.choices[0].text == "the " + found.choices[0].text


def test_several_prompts_in_words_and_tokens(ai):
    kwargs = {"model": "small", "max_tokens": 6, "n": 2, "seed": 3}
    words = ai.completions.create(prompt=["abc", "the end"], **kwargs)
    tokens = ai.completions.create(prompt=[[0, 1, 2], [19, 7, 4, 26, 4, 13, 3]], **kwargs)
    assert [one.text for one in words.choices] == [one.text for one in tokens.choices]
    assert [one.index for one in words.choices] == [0, 1, 2, 3]
    assert words.usage.prompt_tokens == 10
    single = ai.completions.create(prompt=[19, 7, 4, 26, 4, 13, 3], **{**kwargs, "seed": 5, "echo": True})
    assert [one.text for one in single.choices] == ["the end" + one.text for one in words.choices[2:]]


def test_an_underscore_is_an_underscore(ai):
    found = ai.completions.create(model="pairs", prompt="a_b \\_{12}_", max_tokens=4, seed=1, echo=True)
    assert found.choices[0].text.startswith("a_b \\_{12}_")
    with pytest.raises(openai.BadRequestError, match="character '_' at position 1 is not in the vocabulary 'text8'"):
        ai.completions.create(model="small", prompt="a_b")


def test_temperature_zero_is_the_most_probable_token(ai, runs):
    found = ai.completions.create(model="small", prompt="ab", temperature=0, seed=1, n=2, max_tokens=8)
    greedy = runs["small"].config.sampling.changed({"top_k": 1, "temperature": 1.0})
    wanted = expected(runs["small"], prompt="ab", fill=8, seed=1, count=2, settings=greedy)
    assert [choice.text for choice in found.choices] == [one.completion for one in wanted]
    hot = ai.completions.create(model="small", prompt="ab", temperature=1, top_p=1, seed=1, n=2, max_tokens=8)
    assert [choice.text for choice in hot.choices] != [choice.text for choice in found.choices]


def test_further_settings_of_the_sampler(ai, runs):
    body = {"sampling": {"sampler": "first_hitting", "steps": 4}}
    found = ai.completions.create(model="small", prompt="ab", seed=1, max_tokens=8, extra_body=body)
    chosen = SamplingConfig(sampler="first_hitting", steps=4)
    (wanted,) = expected(runs["small"], prompt="ab", fill=8, seed=1, settings=chosen)
    assert found.choices[0].text == wanted.completion


def test_texts_longer_than_the_window_are_written_in_blocks(ai, runs):
    found = ai.completions.create(model="small", prompt="ab", seed=1, max_tokens=70)
    (wanted,) = expected(
        runs["small"],
        prompt="ab",
        length=72,
        seed=1,
        settings=runs["small"].config.sampling.changed({"block": LENGTH // 2}),
    )
    assert found.choices[0].text == wanted.text[2:]
    with pytest.raises(openai.BadRequestError, match="allowed are 1 to 200 tokens"):
        ai.completions.create(model="small", prompt="a" * 150, max_tokens=51)


def test_stop_strings_cut_the_text(ai):
    kwargs = {"model": "small", "prompt": "the ", "max_tokens": 24, "n": 4, "seed": 2}
    whole = [choice.text for choice in ai.completions.create(**kwargs).choices]
    stops = [whole[0][9:11], whole[1][20:23], "zzzzzz"]
    found = ai.completions.create(**kwargs, stop=stops).choices
    for choice, text in zip(found, whole, strict=True):
        places = [text.find(stop) for stop in stops if stop in text]
        assert choice.text == (text[: min(places)] if places else text)
        assert choice.finish_reason == ("stop" if places else "length")
    assert found[0].finish_reason == "stop"
    # What is only repeated ends nothing.
    echoed = ai.completions.create(**kwargs, stop=["he", *stops], echo=True).choices
    places = [[text.find(stop) for stop in ["he", *stops] if stop in text] for text in whole]
    assert [choice.text for choice in echoed] == [
        "the " + text[: min(found, default=None)] for text, found in zip(whole, places, strict=True)
    ]


def test_a_document_ends_with_its_own_token(ai, runs):
    """Of a model of single documents: the end-of-text token is no part of the text, streamed or not."""
    kwargs = {"model": "pairs", "prompt": "a", "max_tokens": 20, "n": 8, "seed": 7}
    wanted = expected(runs["pairs"], prompt="a", fill=20, count=8, seed=7)
    found = ai.completions.create(**kwargs).choices
    assert [choice.text for choice in found] == [one.completion for one in wanted]
    assert [choice.finish_reason for choice in found] == ["stop" if one.stopped else "length" for one in wanted]
    assert not any("<|endoftext|>" in choice.text for choice in found)
    assert streamed(ai, **kwargs)[0] == [choice.text for choice in found]


def streamed(ai, **kwargs) -> tuple[list[str], list[list[str]], list]:
    """The texts of a stream, the pieces in which each came, and all chunks."""
    chunks = list(ai.completions.create(**kwargs, stream=True))
    count = kwargs.get("n", 1) * (len(kwargs["prompt"]) if isinstance(kwargs["prompt"], list) else 1)
    pieces: list[list[str]] = [[] for _ in range(count)]
    reasons: list = [None] * count
    for chunk in chunks:
        for choice in chunk.choices:
            assert reasons[choice.index] is None, "nothing comes after the reason"
            pieces[choice.index].append(choice.text)
            reasons[choice.index] = choice.finish_reason
    assert all(reasons)
    return ["".join(parts) for parts in pieces], pieces, chunks


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"suffix": " end", "echo": True},
        {"stop": ["e", "th"]},
        {"stop": ["he", "a"], "echo": True},
        {"prompt": ["ab", "the "], "n": 2},
        {"extra_body": {"sampling": {"sampler": "p2", "steps": 16}}},
        {"extra_body": {"sampling": {"block": 4}}},
    ],
    ids=["plain", "suffix", "stop", "echo", "prompts", "p2", "blocks"],
)
def test_a_stream_has_the_same_text(ai, more):
    kwargs = {"model": "small", "prompt": "the ", "max_tokens": 20, "seed": 6, **more}
    whole = ai.completions.create(**kwargs)
    texts, pieces, chunks = streamed(ai, **kwargs, stream_options={"include_usage": True})
    assert texts == [choice.text for choice in whole.choices]
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    if "block" in str(more):
        assert sum(map(bool, pieces[0])) >= 4, "blocks are sent as they are filled"


WORDS = st.text(max_size=12)


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(prompt=WORDS, suffix=WORDS, stop=st.lists(st.text(min_size=1, max_size=2), max_size=2), echo=st.booleans())
@example(prompt="\u20ac\u20ac", suffix="\x00", stop=["\ufffd"], echo=True)
@example(prompt="<|endoftext|>", suffix="_{3}", stop=[], echo=True)
def test_any_text_goes_through_byte_pairs_unchanged(client, prompt, suffix, stop, echo):
    text = {"prompt": prompt, "suffix": suffix, "stop": stop, "echo": echo}
    body = {"model": "pairs", "max_tokens": 5, "seed": 1, **text}
    whole = client.post("/v1/completions", json=body)
    assert whole.status_code == 200, whole.text
    (choice,) = whole.json()["choices"]
    assert choice["text"].startswith(prompt if echo else "")
    lines = client.post("/v1/completions", json={**body, "stream": True}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-2]]
    assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
    assert chunks[-1]["finish_reason"] == choice["finish_reason"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"logprobs": 1}, "logprobs can't be had"),
        ({"best_of": 3}, "best_of=3 can't be had"),
        ({"presence_penalty": 0.5}, "presence_penalty can't be had"),
        ({"frequency_penalty": -1}, "frequency_penalty can't be had"),
        ({"logit_bias": {"5": 1}}, "logit_bias can't be had"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "up to 4 strings"),
        ({"stop": ""}, "none of them empty"),
        ({"n": 9}, "at most 8 completions"),
        ({"n": 0}, "n=0: input should be greater than or equal to 1"),
        ({"max_tokens": 201}, "max_tokens=201: at most 200"),
        ({"seed": -1}, "seed=-1"),
        ({"temperature": -1}, "temperature=-1"),
        ({"prompt": []}, "the list is empty"),
        ({"prompt": [99]}, "token 99 at position 0 is none of this model: they are 0 to 26"),
        ({"prompt": "Zürich"}, "'ü' at position 1"),
        ({"model": "digits"}, "makes images: ask /v1/images/generations"),
        ({"extra_body": {"sampling": {"temperature": 2}}, "temperature": 1}, "temperature is given twice"),
        ({"extra_body": {"steps": 3}}, "steps is a setting of the sampler"),
        ({"stream_options": {"include_usage": True}}, "stream_options need stream=true"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(ai, wrong, message):
    with pytest.raises(openai.BadRequestError) as caught:
        ai.completions.create(**{"model": "small", "prompt": "a", **wrong})
    error = caught.value
    assert message in error.message
    assert error.type == "invalid_request_error"
    assert error.request_id
    if len(wrong) == 1 and not {"extra_body", "prompt"} & wrong.keys():
        assert error.param == next(iter(wrong))


def test_neutral_values_are_no_mistakes(ai):
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "best_of": 2, "n": 2, "user": "me"}
    assert len(ai.completions.create(model="small", prompt="a", **neutral).choices) == 2


def test_other_errors_are_those_that_the_client_knows(ai):
    with pytest.raises(openai.NotFoundError) as caught:
        ai.completions.create(model="large", prompt="a")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.InternalServerError, match="NaN"):
        ai.completions.create(model="sick", prompt="a")
    with pytest.raises(openai.APIError, match="NaN"):
        list(ai.completions.create(model="sick", prompt="a", stream=True))


def test_images(ai, runs):
    found = ai.images.generate(model="digits", prompt="", n=2, response_format="b64_json", extra_body={"seed": 5})
    wanted = expected(runs["digits"], count=2, seed=5)
    for picture, one in zip(found.data, wanted, strict=True):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture.b64_json))))
        assert (shown == np.rint(np.array(one.text.split(), int).reshape(8, 8) * 255 / 16)).all()
    assert found.size == "8x8"
    ai.images.generate(prompt="", size="8x8", stream=False, user="me")  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": "1024x1024"}, "makes images of 8x8"),
        ({"prompt": "a cat"}, "it has no classes"),
        ({"model": "small"}, "writes text"),
        ({"response_format": "url"}, "response_format='url'"),
        ({"n": 9}, "n=9: at most 8"),
    ],
)
def test_images_that_cannot_be_had(ai, wrong, message):
    with pytest.raises(openai.BadRequestError) as caught:
        ai.images.generate(**{"prompt": "", "model": "digits", **wrong})
    assert message in caught.value.message
