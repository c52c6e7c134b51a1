"""`make demo`: the whole line as a newcomer would type it, from Python's own documentation to served samples.

    python -m orchestration.demo

Every phase is one `md4` command, shown before it runs. At the end: a summary on the screen and in
`runs/demo/reports/summary.json`, and the loss curve in `runs/demo/reports/loss.png`. An earlier demo is kept aside.
"""

import json
from pathlib import Path
from typing import Any

import httpx

from orchestration.config import load
from orchestration.curves import draw_loss
from orchestration.phases import Demo, bits_before, newest_report
from orchestration.runs import Run
from pipelines.config import prepared_path
from pipelines.manifest import Manifest

PRESET, RUN = "pydocs-tiny", Path("runs/demo")
HOLES = "the function returns a ______ of ____ elements"
SEED = 7


def ask_server(demo: Demo) -> dict[str, Any]:
    """Start the service, send it one request over HTTP, stop it; returns the answer."""
    with demo.serving(str(RUN)) as url:
        body = {"prompt": HOLES, "count": 2, "seed": SEED, "length": len(HOLES)}
        demo.show_command(f"curl {url}/v1/samples --json '{json.dumps(body)}'")
        reply = httpx.post(f"{url}/v1/samples", json=body, timeout=120)
        reply.raise_for_status()
        answer = reply.json()
        demo.console.print_json(data=answer)
        return answer


def main() -> None:
    demo = Demo(RUN)
    demo.keep_earlier()
    with demo.phase("prepare", "1. Python's documentation becomes shards of characters"):
        demo.md4("prepare", PRESET)
    with demo.phase("train", "2. two Ray Train workers learn from them with DeepSpeed ZeRO-2"):
        demo.md4("train", PRESET, f"name={RUN.name}")
    with demo.phase("evaluate", "3. how many bits does a character of unseen documentation cost?"):
        demo.md4("evaluate", str(RUN))
    with demo.phase("sample", "4. the model writes"):
        demo.md4("sample", str(RUN), "--count", "3", "--seed", str(SEED))
    with demo.phase("infill", "5. the model fills holes"):
        demo.md4("sample", str(RUN), "--prompt", HOLES, "--length", str(len(HOLES)), "--count", "3", "--seed", "100")
    with demo.phase("serve", "6. the model answers over HTTP"):
        answer = ask_server(demo)
    summary = summarise(demo, answer)
    demo.finish(summary, describe(summary))


def summarise(demo: Demo, answer: dict[str, Any]) -> dict[str, Any]:
    """The facts of the demo, all read from what the run left behind; draws the loss curve."""
    run = Run(demo.run)
    ngrams = Manifest.load(prepared_path(load(PRESET).data)).ngrams
    assert ngrams is not None  # 27 characters are few enough
    draw_loss(run, run.reports / "loss.png", ngrams.model_dump())
    samples = json.loads((run.samples / f"step-{run.config.train.steps:08d}-seed-{SEED}.json").read_text())
    return {
        "bits_per_char_before": bits_before(run),
        "bits_per_char_after": newest_report(run)["bits_per_token"],
        "unigram_bits": ngrams.unigram,
        "bigram_bits": ngrams.bigram,
        "trigram_bits": ngrams.trigram,
        **demo.results(),
        "sample": samples["samples"][0]["text"],
        "infill": answer["samples"][0]["text"],
    }


def describe(summary: dict[str, Any]) -> list[str]:
    """The summary as lines for a reader."""
    after, bigram, trigram = (summary[key] for key in ("bits_per_char_after", "bigram_bits", "trigram_bits"))
    place = "below" if after < bigram else "NOT below"
    seconds = summary["seconds"]["train"]
    return [
        f"bits per character   {summary['bits_per_char_before']:.3f} before training, "
        f"{after:.3f} ± {summary['standard_error']:.3f} after (upper bound, unseen documents)",
        f"the corpus's own     {summary['unigram_bits']:.3f} unigram, {bigram:.3f} bigram, {trigram:.3f} trigram",
        f"                     {place} the bigram entropy; {after - trigram:+.3f} bits from the trigram's",
        f"training             {summary['train_tokens_per_second']:,.0f} tokens/s, {seconds:.0f} s with start and stop",
        f"a sample             {summary['sample'][:100]}",
        f"holes                {HOLES}",
        f"filled               {summary['infill']}",
        f"everything is in     {RUN}/ (loss curve: {RUN}/reports/loss.png)",
        "",
        f"next: .venv/bin/md4 sample {RUN} --prompt 'import ______ from' --count 5",
        f"      .venv/bin/md4 serve {RUN}        # a page at http://127.0.0.1:8000",
        f"      .venv/bin/md4 train {PRESET} name=longer train.steps=4000",
        f"      .venv/bin/md4 train {PRESET} name=mine data.source=text data.path=FILE_OR_FOLDER",
    ]


if __name__ == "__main__":
    main()
