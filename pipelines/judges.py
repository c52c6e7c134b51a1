"""A judge: a causal language model of another kind, which says how probable a text is.

Generative perplexity is what a judge makes of the texts that a model wrote. The texts reach it as characters: decoded
by the vocabulary of the model that wrote them, cut into tokens again by the judge's own tokenizer. Numbers under two
judges are not to be compared, and a perplexity says little without the entropy of the samples (`pipelines.quality`):
the most probable texts repeat themselves.

Conventions, as they stand in the reports:

    first token  scored after the beginning-of-sequence token where the tokenizer has one, otherwise not scored
    long texts   windows as long as the judge can see, each going half a window further; all tokens count, once
    precision    float32; nats are summed in float64
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from md4.errors import UserError
from pipelines.extras import extra

LONGEST_WINDOW = 1024  # of a judge that doesn't say how much it can see
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class JudgeFacts(BaseModel):
    """What a report says of the judge."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    judge: str = Field(description="name on the hub, or of the folder")
    judge_sha256: str = Field(description="of its tensors in float32 and of its tokenizer")
    judge_window: int = Field(description="tokens it sees at once")
    judge_stride: int = Field(description="new tokens of each further window of a longer text")
    judge_first_token: str = Field(description="scored after which token, or not scored")


@dataclass(frozen=True)
class Scores:
    """What a judge says of N texts."""

    nats: np.ndarray  # [N] float64: negative log-probability of the text
    tokens: np.ndarray  # [N] int64: the judge's tokens that were scored
    features: np.ndarray | None = None  # [N, D] float32: last hidden state at the last token of the first window


class Judge:
    """A causal language model of the `transformers` library with its tokenizer, in eval mode, in float32.

    model: gives `logits [B, T, V]` for `input_ids [B, T]`. tokenizer: of the library, with its fast or slow interface.
    Raises `UserError` if the two don't belong together, or if the model sees tokens that are still to come.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, device: torch.device | str | None = None):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.eval().float().to(self.device)
        self.tokenizer = tokenizer
        self.bos: int | None = tokenizer.bos_token_id
        known = self.model.get_input_embeddings().num_embeddings
        if len(tokenizer) > known:
            raise UserError(f"judge {name!r}: its tokenizer has {len(tokenizer)} tokens, its model knows {known}")
        limits = (getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
        # A tokenizer without a limit says so with a number of thirty digits.
        window = min((int(limit) for limit in limits if limit and limit < 1_000_000), default=LONGEST_WINDOW)
        if window < 2:
            raise UserError(f"judge {name!r} sees {window} tokens at once; at least 2 are needed")
        self.facts = JudgeFacts(
            judge=name,
            judge_sha256=_sha256(self.model, tokenizer),
            judge_window=window,
            judge_stride=window // 2,
            judge_first_token="not scored" if self.bos is None else f"scored after {tokenizer.bos_token}",
        )
        self._check_causal(known)

    @classmethod
    def load(cls, where: str, device: torch.device | str | None = None) -> "Judge":
        """The judge in a folder, as `save_pretrained` writes it with its tokenizer, or by its name on the hub.

        The hub is asked only if there is no such folder. Weights are read from safetensors alone, and code that comes
        with a model is not run. UserError if it can't be had, is incomplete, or is no causal language model.
        """
        transformers = extra("transformers", "a judge")
        folder = Path(where)
        if folder.exists() and not (folder / "config.json").is_file():
            raise UserError(f"judge {where!r} is not the folder of a model: it has no config.json")
        if not folder.exists() and not _HUB_NAME.fullmatch(where):
            raise UserError(f"judge {where!r}: there is no such folder, and a name on the hub looks like owner/name")
        options = {"local_files_only": folder.exists(), "trust_remote_code": False}
        with _quietly(transformers):
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
                model, found = transformers.AutoModelForCausalLM.from_pretrained(
                    where, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
                )
            except Exception as error:  # the library raises many kinds, and so do the formats below it
                what = "can't be read" if folder.exists() else "is neither a folder nor a model that the hub gives"
                raise UserError(f"judge {where!r} {what}: {_first_line(error)}") from None
        # What a file lacks, the library fills with random numbers.
        lacking = sorted(found["missing_keys"]) + sorted(map(str, found["mismatched_keys"]))
        if lacking:
            raise UserError(f"judge {where!r} is incomplete: {len(lacking)} of its tensors are missing, {lacking[0]}")
        return cls(folder.resolve().name if folder.exists() else where, model, tokenizer, device)

    @torch.inference_mode()
    def score(
        self,
        texts: Sequence[str],
        *,
        features: bool = False,
        batch_size: int = 8,
        advance: Callable[[int], None] = lambda _: None,
    ) -> Scores:
        """How probable each text is. features: its features too. advance: told how many windows are done."""
        ids = [self.encode(text) for text in texts]
        nats, tokens = np.zeros(len(ids)), np.zeros(len(ids), np.int64)
        kept: dict[int, np.ndarray] = {}
        pieces = [(row, *piece) for row, sequence in enumerate(ids) for piece in self._windows(len(sequence))]
        pieces.sort(key=lambda piece: piece[1] - piece[3])  # alike in length, the longest first
        for start in range(0, len(pieces), batch_size):
            batch = pieces[start : start + batch_size]
            known = torch.zeros(len(batch), max(end - begin for _, begin, _, end in batch), dtype=torch.int64)
            mask = torch.zeros_like(known)
            for place, (row, begin, _, end) in enumerate(batch):
                known[place, : end - begin], mask[place, : end - begin] = ids[row][begin:end], 1
            known, mask = known.to(self.device), mask.to(self.device)
            answer = self.model(input_ids=known, attention_mask=mask, use_cache=False, output_hidden_states=features)
            for place, (row, begin, first, end) in enumerate(batch):
                logits = answer.logits[place, first - begin - 1 : end - begin - 1]
                loss = cross_entropy(logits.float(), known[place, first - begin : end - begin], reduction="none")
                nats[row] += float(loss.double().sum())
                tokens[row] += end - first
                if features and begin == 0 and first == 1:
                    kept[row] = answer.hidden_states[-1][place, end - 1].float().cpu().numpy()
            advance(len(batch))
        if not np.isfinite(nats).all():
            raise UserError(f"judge {self.facts.judge!r} answered with NaN or infinity")
        return Scores(nats, tokens, self._stack(kept, len(ids)) if features else None)

    def encode(self, text: str) -> Tensor:
        """The judge's tokens `[n]` int64 of a text, its beginning-of-sequence token first if there is one."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids if self.bos is None else [self.bos, *ids], dtype=torch.int64)

    def _windows(self, length: int) -> Iterator[tuple[int, int, int]]:
        """(begin, first scored, end) of the windows on `length` tokens: all but the first are scored, each once."""
        end = min(self.facts.judge_window, length)
        if length:
            yield 0, 1, end
        while end < length:
            further = min(end + self.facts.judge_stride, length)
            yield further - self.facts.judge_window, end, further
            end = further

    @staticmethod
    def _stack(kept: dict[int, np.ndarray], count: int) -> np.ndarray:
        for row in range(count):
            if row not in kept:
                raise UserError(f"text {row} is empty: it has no features")
        return np.stack([kept[row] for row in range(count)])

    @torch.inference_mode()
    def _check_causal(self, known: int) -> None:
        """Another last token must not change what is said before it."""
        ids = torch.arange(min(8, self.facts.judge_window), device=self.device).remainder(known)[None]
        other = ids.clone()
        other[0, -1] = (ids[0, -1] + 1) % known
        one, two = (self.model(input_ids=tokens, use_cache=False).logits[:, :-1] for tokens in (ids, other))
        if not torch.allclose(one, two, rtol=1e-3, atol=1e-3):
            raise UserError(f"judge {self.facts.judge!r} is no causal language model: it sees tokens still to come")


class _quietly:
    """The library's warnings and progress bars off for a while; what they would say is checked here."""

    def __init__(self, transformers: Any):
        self._logging = transformers.utils.logging

    def __enter__(self) -> None:
        self._verbosity = self._logging.get_verbosity()
        self._bars = self._logging.is_progress_bar_enabled()
        self._logging.set_verbosity_error()
        self._logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        self._logging.set_verbosity(self._verbosity)
        if self._bars:
            self._logging.enable_progress_bar()


def _sha256(model: torch.nn.Module, tokenizer: Any) -> str:
    """Of names, shapes and float32 values of the parameters, and of all that decides how text becomes tokens."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    digest.update(f"{words}\n{tokenizer.bos_token_id}".encode())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
