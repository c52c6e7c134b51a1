"""Fixed texts with holes, filled with the same seeds every time: what comes out, and how much is right."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from md4 import samplers
from md4.errors import UserError
from md4.samplers import Job, wording
from md4.samplers.rows import KNOWN
from orchestration.runs import Loaded
from orchestration.sampling import Request, prepare, read
from orchestration.suites.answers import check
from orchestration.suites.settings import Prompts
from pipelines.quality import histogram_entropy


class Filling(BaseModel):
    """One text as it came out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: str
    text: str
    seed: int
    entropy: float  # nats, of the histogram of the tokens that were written
    right: bool | None = None  # where an answer is known


@dataclass(frozen=True)
class Filled:
    """All fillings of an entry of a suite, text after text."""

    prompts: Prompts
    fillings: list[Filling]
    settings: dict[str, Any]  # of the sampler, as resolved
    vocabulary: str

    @property
    def texts(self) -> np.ndarray:
        """Which text each filling is of, `[N]`."""
        return np.repeat(np.arange(len(self.prompts.texts)), self.prompts.count)

    @property
    def entropies(self) -> np.ndarray:
        """Nats, `[N]`."""
        return np.array([one.entropy for one in self.fillings])

    @property
    def matches(self) -> np.ndarray:
        """1 where a filling is right and 0 where it is wrong, `[M]` of those whose answer is known."""
        return np.array([float(one.right) for one in self.fillings if one.right is not None])

    @property
    def answered(self) -> np.ndarray:
        """Which text each of these is of, `[M]`."""
        known = [one.right is not None for one in self.fillings]
        return self.texts[np.array(known, bool)]


@dataclass(frozen=True)
class Plan:
    """What is to be filled of a model, all of it checked."""

    loaded: Loaded
    prompts: Prompts
    requests: list[Request]
    jobs: list[Job]
    answers: list[str | None]

    @classmethod
    def of(cls, loaded: Loaded, prompts: Prompts) -> "Plan":
        """UserError for texts, answers and settings that the model can't be asked for, which it names."""
        if loaded.config.data.has_images:
            raise UserError(f"prompts are texts, and {loaded.config.name} makes images")
        settings = wording.change(loaded.config.sampling, prompts.settings)
        words, requests, jobs, answers = loaded.vocabulary, [], [], []
        for place, one in enumerate(prompts.texts):
            try:
                known = words.encode_prompt(one.text)
                length = prompts.length or len(known)
                request = Request(
                    one.text, prompts.count, length, prompts.seed + place * prompts.count, settings=settings
                )
                job = prepare(loaded, request)
                if not bool((job.canvas == loaded.model.mask_id).any()):
                    raise UserError("it has no hole to fill: write `_` for one, or give a greater length")
                answer = None if one.answer is None else words.normalise(one.answer)
                if answer is not None:
                    check(words, known, length, answer)
            except UserError as error:
                raise UserError(f"prompt {one.text!r}: {error}") from None
            requests.append(request)
            jobs.append(job)
            answers.append(answer)
        return cls(loaded, prompts, requests, jobs, answers)

    def fill(self, batch_size: int, say: Callable[[str], None]) -> Filled:
        """Fill all texts; each comes out as it would alone. UserError if the network answers with NaN."""
        if torch.cuda.is_available():
            self.loaded.model.to("cuda")
        say(f"filling {len(self.jobs)} texts, {self.prompts.count} times each")
        results = samplers.run(self.loaded.model, self.jobs, batch_size)
        fillings = []
        for request, job, answer, result in zip(self.requests, self.jobs, self.answers, results, strict=True):
            found = read(self.loaded, request, job, result)
            if isinstance(found, UserError):
                raise found
            written = [
                row[event != KNOWN].cpu().numpy() for row, event in zip(result.tokens, result.event, strict=True)
            ]
            for sample, entropy in zip(found.samples, histogram_entropy(written), strict=True):
                right = None if answer is None else sample.text.startswith(answer)
                fillings.append(
                    Filling(
                        prompt=str(request.prompt), text=sample.text, seed=sample.seed, entropy=entropy, right=right
                    )
                )
        settings = results[0].settings.model_dump(mode="json", exclude_none=True)
        return Filled(self.prompts, fillings, settings, self.loaded.vocabulary.name)
