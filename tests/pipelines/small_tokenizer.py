"""A small trained vocabulary, made in milliseconds."""

from pathlib import Path

from pipelines.vocabularies.training import learn

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog on a mat"]


def write_tokenizer(folder: Path, size: int = 270) -> Path:
    """A folder with the tokenizer.json of `size` tokens; the end of a text is 0."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(learn(TEXTS * 3, size))
    return folder
