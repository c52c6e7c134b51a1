"""Tokens/s of `md4 prepare` against Hugging Face's `datasets.map`, with the same GPT-2 tokenizer on the same documents.

    MD4_GPT2=FOLDER python -m tests.benchmarks.bench_prepare [ROUNDS] [MEGABYTES] [FILE]

Documents of about 20 kB are cut from FILE, or from the documentation that ships with Python, repeated until there are
enough of them. Both write parquet with rows of 1,024 tokens, on two processes. `datasets` reads the documents from
JSON lines into a cache that is new each time, tokenizes them in batches of 1,000 (`num_proc=2`), joins them with
end-of-text tokens into rows and saves these; `md4 prepare` also hashes and shuffles documents, writes checksums and
puts everything to disk before it is done. Each has run once before; Ray runs already. Goal: at least equal.
"""

import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray

from orchestration.cluster import start_local
from pipelines import sources
from pipelines.config import DataConfig
from pipelines.manifest import Manifest
from pipelines.prepare import prepare
from pipelines.vocabularies import BytePairs
from tests.benchmarks.harness import Benchmark

LENGTH, CHARS, PROCESSES = 1024, 20_000, 2


def documents(megabytes: float, file: str | None) -> list[str]:
    """Different documents of this size in all: each begins with its number."""
    if file is not None:
        text = Path(file).read_text(encoding="utf-8")
    else:
        units = sources.open_source("pydocs", None).list_units(2**22)
        text = "\n\n".join(document.text for unit in units for document in sources.read(unit).documents)
    pieces = [text[start : start + CHARS] for start in range(0, len(text), CHARS)]
    found, size = [], 0.0
    for number, piece in enumerate(itertools.cycle(pieces)):
        if size >= megabytes * 1e6:
            return found
        found.append(f"{number}. {piece}")
        size += len(found[-1].encode())
    raise AssertionError


def by_datasets(lines: Path, folder: Path) -> float:
    import datasets

    datasets.disable_progress_bars()
    words = BytePairs()
    tokenizer, end = words._tokenizer, words.end_of_text

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        found = tokenizer.encode_batch(batch["text"], add_special_tokens=False)
        return {"tokens": [[*encoding.ids, end] for encoding in found]}

    def group(batch: dict[str, Any]) -> dict[str, Any]:
        joined = list(itertools.chain.from_iterable(batch["tokens"]))
        return {"tokens": [joined[lo : lo + LENGTH] for lo in range(0, len(joined) - LENGTH + 1, LENGTH)]}

    began = time.perf_counter()
    loaded = datasets.load_dataset("json", data_files=str(lines), split="train", cache_dir=str(folder / "cache"))
    tokens = loaded.map(tokenize, batched=True, num_proc=PROCESSES, remove_columns=loaded.column_names)
    rows = tokens.map(group, batched=True, num_proc=PROCESSES)
    rows.to_parquet(str(folder / "rows.parquet"))
    seconds = time.perf_counter() - began
    assert np.shape(rows[0]["tokens"]) == (LENGTH,)
    return len(rows) * LENGTH / seconds


def by_md4(corpus: Path, folder: Path) -> float:
    config = DataConfig(
        source="text", path=str(corpus), vocabulary="gpt2", length=LENGTH, validation=0, test=0,
        document_chars=10 * CHARS, directory=str(folder),
    )  # fmt: skip
    began = time.perf_counter()
    root = prepare(config, lambda _: None)
    seconds = time.perf_counter() - began
    return Manifest.load(root).splits["train"].rows * LENGTH / seconds


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    megabytes = float(sys.argv[2]) if len(sys.argv) > 2 else 60
    file = sys.argv[3] if len(sys.argv) > 3 else None
    # Both have two processes; threads of the tokenizer in each of them would be four on two cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["HF_HUB_OFFLINE"] = "1"
    benchmark = Benchmark("prepare", "tokens/s", baseline="datasets.map")
    start_local(num_cpus=PROCESSES)
    with tempfile.TemporaryDirectory() as folder:
        corpus, lines = Path(folder, "corpus"), Path(folder, "corpus.jsonl")
        corpus.mkdir()
        with lines.open("w", encoding="utf-8") as out:
            for number, text in enumerate(documents(megabytes, file)):
                (corpus / f"{number:06d}.txt").write_text(text, encoding="utf-8")
                out.write(json.dumps({"text": text}) + "\n")
        benchmark.notes["corpus, MB"] = round(sum(text.stat().st_size for text in corpus.iterdir()) / 1e6, 1)
        out = Path(folder, "out")

        def fresh(work: Any, source: Path) -> float:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            return work(source, out)

        variants = {
            "datasets.map": lambda: fresh(by_datasets, lines),
            "md4 prepare": lambda: fresh(by_md4, corpus),
        }
        for work in variants.values():
            work()
        benchmark.run(variants, rounds)
    ray.shutdown()
    benchmark.goal("md4 prepare", 1.0)
    benchmark.report()


if __name__ == "__main__":
    main()
