"""A trained model as a folder that anyone can read: safetensors and JSON, nothing of a run and nothing pickled.

    exports/mine/
        model.safetensors    float32 weights by parameter name
        config.json          the model's configuration, how it is sampled, its symbols, the sha256 of the weights
        tokenizer.json       of vocabularies that such a file describes; needs the package `tokenizers` to be used
        grids/               settings that were found for it, of `grid=searched` and `sampler=best`

    import md4
    model = md4.load("exports/mine")
    print(*model.text(model.sample(3, seed=1)), sep="\\n")

`md4 export RUN FOLDER` makes one from a run. Weights of the reference implementation become one by
`export(folder, load_reference(file, config), config)`, see `md4.interchange`.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from md4 import samplers
from md4.errors import UserError
from md4.model import ModelConfig, skeleton
from md4.objectives import MaskedDiffusion
from md4.samplers import Job, SamplingConfig, wording
from md4.samplers.saved import FOLDER as GRIDS
from md4.samplers.saved import Saved, SavedSettings
from md4.text import Pieces, Symbols

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


class Card(BaseModel):
    """What `config.json` says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["md4"] = "md4"
    version: Literal[1] = 1  # of this layout
    model: ModelConfig
    sampling: SamplingConfig = Field(SamplingConfig(), description="how it is sampled unless told otherwise")
    vocabulary: str | None = Field(None, description="name of the vocabulary of its tokens")
    symbols: str | None = Field(None, description="the character of each token, of vocabularies that have such")
    tokenizer_sha256: str | None = Field(None, description="of tokenizer.json, of vocabularies that have one")
    grids: dict[str, str] = Field(default_factory=dict, description="sha256 of each file in grids/")
    sha256: str = Field(description="of the file of weights")
    code_version: str | None = None
    source: dict[str, Any] = Field(default_factory=dict, description="where the weights come from, for the reader")


@dataclass(frozen=True)
class Pretrained:
    """A model ready to use. `model` itself is in eval mode, with float32 weights."""

    model: MaskedDiffusion
    card: Card
    folder: Path | None = None  # where tokenizer.json is

    @property
    def config(self) -> ModelConfig:
        return self.card.model

    def logits(self, z: Tensor, t: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """See `MaskedDiffusion.logits`: float32 `[B, L, V]` for masked tokens z `[B, L]` at times t."""
        return self.model.logits(z, t, labels)

    def sample(
        self,
        count: int | None = None,
        *,
        seed: int = 0,
        length: int | None = None,
        canvas: Tensor | None = None,
        labels: Sequence[int] | int | None = None,
        stop: int | str | None = None,
        batch_size: int = 64,
        **settings: Any,
    ) -> Tensor:
        """New examples: int64 `[count, L]`, or `[count, H, W, C]` of images.

        Args:
            count: how many; if not given, one, or one of each canvas.
            seed: of the first one; the others count up from it. The same seed gives the same example.
            length: tokens of a text; by default those of a training example. More need `block=N`.
            canvas: `[L]` or `[count, L]`, images as `[H, W, C]` or `[count, H, W, C]`: known tokens, with the mask id
                (`model.mask_id`) where new ones are wanted.
            labels: the class of all or of each, for class-conditional models.
            stop: a token that ends a text, or its symbol: nothing but it follows the first one.
            settings: changes to the model's own `SamplingConfig`, such as `sampler="first_hitting", steps=64`.

        Raises UserError for what can't be sampled.
        """
        canvases = self._canvases(count, length, canvas)
        count = len(canvases)
        if not 0 <= seed <= 2**63 - 1 - count:
            raise UserError(f"seed is {seed}; it must lie between 0 and {2**63 - 1 - count}")
        job = Job(
            canvases.to(next(self.model.parameters()).device),
            torch.arange(seed, seed + count),
            wording.change(self.card.sampling, settings),
            self._labels(count, labels),
            self._stop(stop),
            self.config.length,
        )
        (result,) = samplers.run(self.model, [job], batch_size)
        if bool(result.broken.any()):
            raise UserError("the network answered with NaN or infinity: the model is damaged")
        shape = self.config.shape
        return result.tokens if shape is None else result.tokens.unflatten(1, shape)

    def text(self, tokens: Tensor) -> list[str]:
        """Tokens `[n, L]` as text, masks shown as `_`; UserError if the folder doesn't say what its tokens are."""
        return [self._words.decode(row) for row in tokens.flatten(1).tolist()]

    def tokens(self, text: str) -> Tensor:
        """Text as tokens `[n]` int64, `_` being the mask: the beginning of a canvas. UserError as of `text`."""
        return torch.tensor(self._words.encode(text), dtype=torch.int64)

    @cached_property
    def _words(self) -> Symbols | Pieces:
        if self.card.symbols is not None:
            return Symbols(self.card.symbols)
        name = self.card.vocabulary
        if self.card.tokenizer_sha256 is None or self.folder is None:
            raise UserError(f"the tokens of vocabulary {name!r} are not characters: decode them with that vocabulary")
        file = self.folder / TOKENIZER
        if not file.is_file() or _sha256(file) != self.card.tokenizer_sha256:
            raise UserError(f"{file} is missing or damaged (its sha256 is not the one in {CONFIG})")
        return Pieces(file, self.config.vocab_size)

    def _canvases(self, count: int | None, length: int | None, canvas: Tensor | None) -> Tensor:
        """What is known of each example, `[count, L]`."""
        if canvas is not None and length is not None:
            raise UserError("give a canvas or a length, not both: a canvas has its own length")
        if count is not None and count < 1:
            raise UserError(f"count is {count}; at least 1 is needed")
        own, shape = self.config.length, self.config.shape
        if canvas is None:
            canvas = torch.full((max(0, own if length is None else length),), self.model.mask_id)
        elif shape is not None and canvas.shape[-3:] == shape:
            canvas = canvas.flatten(-3)
        if canvas.ndim not in (1, 2) or canvas.dtype != torch.int64:
            kind = f"{canvas.dtype}".removeprefix("torch.")
            raise UserError(f"a canvas is int64 [L] or [count, L], not {kind} {list(canvas.shape)}")
        canvas = canvas if canvas.ndim == 2 else canvas[None]
        if 0 in canvas.shape or (shape is not None and canvas.shape[1] != own):
            allowed = "at least 1 is possible" if shape is None else f"this model makes {own} tokens"
            raise UserError(f"length is {canvas.shape[1]}; {allowed}")
        if count not in (None, len(canvas)) and len(canvas) != 1:
            raise UserError(f"count is {count}, but there are {len(canvas)} canvases")
        return canvas if len(canvas) > 1 else canvas.expand(count or 1, -1)

    def _stop(self, stop: int | str | None) -> int | None:
        if not isinstance(stop, str):
            return stop
        symbols = self.card.symbols or ""
        if self.card.tokenizer_sha256 is not None and (token := self._words.token(stop)) is not None:
            return token
        if len(stop) != 1 or stop not in symbols:
            known = f"one of the symbols {symbols!r}" if symbols else "the number of a token: it has no symbols"
            raise UserError(f"stop is {stop!r}; this model takes {known}")
        return symbols.index(stop)

    def _labels(self, count: int, labels: Sequence[int] | int | None) -> Tensor | None:
        classes = self.config.classes
        if labels is None:
            if classes:
                raise UserError(f"this model is class-conditional: labels from 0 to {classes - 1} are needed")
            return None
        values = [labels] * count if isinstance(labels, int) else [int(label) for label in labels]
        allowed = f"allowed are 0 to {classes - 1}" if classes else "this model has no classes"
        for value in values:
            if not 0 <= value < classes:
                raise UserError(f"label is {value}; {allowed}")
        return torch.tensor(values)


def export(
    folder: str | Path,
    model: MaskedDiffusion,
    config: ModelConfig,
    *,
    sampling: SamplingConfig | None = None,
    vocabulary: str | None = None,
    symbols: str | None = None,
    tokenizer: bytes | None = None,
    saved: Sequence[SavedSettings] = (),
    source: dict[str, Any] | None = None,
) -> Path:
    """Write `model`, which is of `config`, to a new folder; returns it. The folder appears complete or not at all.

    tokenizer: content of the vocabulary's tokenizer.json, if it has one; saved: settings that were found for the
    model. The other arguments are those of `Card`.
    Raises UserError if the folder exists and isn't empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already and is not an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".{folder.name}-{uuid.uuid4().hex[:6]}"
    aside.mkdir()
    try:
        tensors = {name: tensor.detach().cpu().float().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, str(aside / WEIGHTS), metadata={"format": "pt"})
        (aside / WEIGHTS).chmod(0o644)  # safetensors makes it private; an export is there to be shared
        if tokenizer is not None:
            (aside / TOKENIZER).write_bytes(tokenizer)
        for one in saved:
            (aside / GRIDS).mkdir(exist_ok=True)
            (aside / GRIDS / one.file).write_bytes(one.content())
        card = Card(
            model=config,
            sampling=sampling or SamplingConfig(),
            vocabulary=vocabulary,
            symbols=symbols,
            tokenizer_sha256=None if tokenizer is None else _sha256(aside / TOKENIZER),
            grids={one.file: _sha256(aside / GRIDS / one.file) for one in saved},
            sha256=_sha256(aside / WEIGHTS),
            code_version=_code_version(),
            source=source or {},
        )
        (aside / CONFIG).write_text(card.model_dump_json(indent=1) + "\n", encoding="utf-8")
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def load(folder: str | Path, *, compute: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Pretrained:
    """The model of an exported folder, in eval mode. Its weights are compared with the hash in its configuration.

    compute: torch.bfloat16 to run the network's blocks in it.

    Raises UserError for a folder that is not an export, or damaged, or of a later version.
    """
    folder = Path(folder)
    card = _read_card(folder)
    file = folder / WEIGHTS
    if not file.is_file():
        raise UserError(f"{folder} is incomplete: {WEIGHTS} is missing")
    if _sha256(file) != card.sha256:
        raise UserError(f"{file} is damaged (its sha256 differs from the one in {CONFIG})")
    try:
        tensors = load_file(str(file))
    except SafetensorError as error:
        raise UserError(f"{file} is not a readable file of weights ({error})") from None
    model = skeleton(card.model, compute)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != wanted:
        different = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        name = different[0]
        raise UserError(
            f"{file} is of another network: {len(different)} tensors differ, the first is {name} "
            f"(stored {found.get(name)}, network {wanted.get(name)})"
        )
    # Copied rather than taken over: the file's tensors lie at odd addresses, for which kernels round otherwise.
    model.to_empty(device="cpu")
    model.load_state_dict(tensors)
    model.saved = _saved(folder, card)
    return Pretrained(model.eval().to(device), card, folder)


def _saved(folder: Path, card: Card) -> Saved:
    """The settings in grids/ that the card names; UserError if one is missing or damaged."""
    found = []
    for name, wanted in card.grids.items():
        file = folder / GRIDS / Path(name).name
        if not file.is_file() or _sha256(file) != wanted:
            raise UserError(f"{file} is missing or damaged (its sha256 is not the one in {CONFIG})")
        found.append(SavedSettings.read(file, file.read_bytes()))
    return Saved.of(found)


def _read_card(folder: Path) -> Card:
    if (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is a run: `md4 export {folder} FOLDER` makes a folder of it that can be loaded")
    try:
        tree = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{folder} is not an exported model (it has no {CONFIG})") from None
    except ValueError as error:
        raise UserError(f"{folder / CONFIG} is not JSON ({error})") from None
    if not isinstance(tree, dict) or tree.get("format") != "md4":
        raise UserError(f"{folder / CONFIG} does not describe an exported model (its format is not 'md4')")
    if tree.get("version") != 1:
        raise UserError(f"{folder} has version {tree.get('version')!r}; this code reads version 1")
    try:
        return Card.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{folder / CONFIG}: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    return f"{where or 'it'} is {problem['input']!r:.80}: {problem['msg'].removeprefix('Value error, ')}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _code_version() -> str | None:
    try:
        return version("md4")
    except PackageNotFoundError:  # used from a source tree
        return None
