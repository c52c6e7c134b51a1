"""What may be prepared: configurations that make no sense, and the folder that one is given."""

import re

import pytest
from pydantic import ValidationError

from md4.errors import UserError
from pipelines.config import DataConfig, prepared_path
from tests.pipelines.test_prepare import config


def messages(error: Exception) -> list[str]:
    assert isinstance(error, ValidationError)
    return [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": 0.6, "test": 0.5}, "validation + test must be below 1"),
        ({"rows_per_shard": 100}, "multiple of rows_per_group 64, got 100"),
        ({"length": 0}, "length: Input should be greater than or equal to 8"),
        ({"lenght": 256}, "lenght: Extra inputs are not permitted"),
        ({"test": -0.1}, "test: Input should be greater than or equal to 0"),
    ],
)
def test_configurations_that_make_no_sense(changes, message):
    with pytest.raises(ValidationError) as caught:
        DataConfig(**changes)
    assert any(message in found for found in messages(caught.value))


def test_the_folder_is_named_by_source_and_configuration(tmp_path):
    base = config(tmp_path / "my books", tmp_path)
    name = prepared_path(base).name
    assert name.startswith("my-books-text8-32-")
    assert name == prepared_path(config(tmp_path / "my books", tmp_path / "elsewhere")).name
    others = [{"validation": 0.1}, {"length": 64}, {"path": str(tmp_path / "other" / "my books")}, {"part_bytes": 5000}]
    assert len({name} | {prepared_path(base.model_copy(update=change)).name for change in others}) == 5
    assert prepared_path(DataConfig()).name.startswith("pydocs-text8-256-")


@pytest.mark.parametrize(("kind", "nearest"), [("pydoc", "pydocs"), ("image", "images"), ("digit", "digits")])
def test_unknown_sources(kind, nearest):
    with pytest.raises(UserError, match=f"unknown data source '{kind}'.*did you mean '{nearest}'"):
        prepared_path(DataConfig(source=kind))


# -- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "shape", "levels", "length"),
    [
        ({"source": "digits"}, (8, 8, 1), 17, 64),
        ({"source": "digits", "levels": 2}, (8, 8, 1), 2, 64),
        ({"source": "idx", "path": "x"}, (28, 28, 1), 256, 784),
        ({"source": "cifar", "path": "x", "shape": None, "levels": None}, (32, 32, 3), 256, 3072),
        ({"source": "images", "path": "x", "shape": [4, 3, 3], "vocabulary": "pixels"}, (4, 3, 3), 256, 36),
    ],
)
def test_images_know_their_vocabulary_and_length(settings, shape, levels, length):
    data = DataConfig(**settings)
    assert (data.vocabulary, data.shape, data.levels, data.length) == ("pixels", shape, levels, length)
    assert data.tokens.size == levels
    assert DataConfig.model_validate(data.model_dump(mode="json")) == data


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "images", "path": "x"}, "shape must be given for source=images"),
        ({"source": "images", "path": "x", "shape": [8, 8, 2]}, r"shape=[8, 8, 2] must be .* 1 or 3 channels"),
        ({"source": "images", "path": "x", "shape": [8, 8]}, "shape.2: Field required"),
        ({"source": "images", "path": "x", "shape": [0, 8, 3]}, "length"),
        ({"source": "digits", "length": 100}, "length=100 must be height * width * channels = 64"),
        ({"source": "digits", "levels": 18}, "levels=18: source=digits has 17"),
        ({"source": "idx", "levels": 257}, "levels: Input should be less than or equal to 256"),
        ({"source": "digits", "vocabulary": "text8"}, "vocabulary=text8 is for text, but source=digits has images"),
        ({"source": "pydocs", "vocabulary": "pixels"}, "vocabulary=pixels is for images, but source=pydocs is text"),
        ({"source": "pydocs", "shape": [8, 8, 1]}, "shape and levels are for images"),
        ({"source": "digits", "fit": "stretch"}, "fit: Input should be 'exact' or 'crop'"),
    ],
)
def test_configurations_of_images_that_make_no_sense(settings, message):
    with pytest.raises(ValidationError) as caught:
        DataConfig(**settings)
    pattern = message if ".*" in message else re.escape(message)
    assert any(re.search(pattern.replace("[8, 8, 2]", r"\[8, 8, 2\]"), found) for found in messages(caught.value))


def test_only_settings_that_decide_the_result_name_the_folder():
    digits = prepared_path(DataConfig(source="digits")).name
    assert digits.startswith("digits-pixels-64-")
    assert digits == prepared_path(DataConfig(source="digits", document_chars=999)).name
    assert digits != prepared_path(DataConfig(source="digits", levels=4)).name
    text = prepared_path(DataConfig()).name
    assert text == prepared_path(DataConfig(fit="crop")).name
