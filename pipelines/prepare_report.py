"""What a preparation counted, for a person to read: `report.md` and `report.json` in the set's folder."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from md4.errors import UserError
from pipelines.manifest import Manifest
from pipelines.part_records import LONGEST, PartRecord, unpacked_counts
from pipelines.rejects import joined_examples
from pipelines.storage import Folder, Place
from pipelines.vocabularies import Vocabulary

JSON_FILE, MARKDOWN_FILE = "report.json", "report.md"
_FREQUENT = 20  # tokens that are listed
_BAR = 40  # letters of the longest bar


def gather(manifest: Manifest, words: Vocabulary, records: Sequence[PartRecord], seconds: float) -> dict[str, Any]:
    """The report as JSON values, from the records of all parts.

    seconds: since this preparation began; what was ready from before took none of them.
    """
    tallies = [record.tally for record in records if record.tally]
    width = max((len(tally.lengths) for tally in tallies), default=0)
    lengths = sum((np.pad(tally.lengths, (0, width - len(tally.lengths))) for tally in tallies), np.zeros(width, int))
    counted = [unpacked_counts(tally.tokens) for tally in tallies if tally.tokens]
    longest = sorted((pair for tally in tallies for pair in tally.longest), key=lambda pair: (-pair[0], pair[1]))
    tokens = sum(split.tokens for split in manifest.splits.values())
    return {
        "source": manifest.source.model_dump(),
        "fingerprint": manifest.fingerprint,
        "packing": manifest.packing,
        "splits": {
            name: {
                "documents": split.documents,
                "characters": split.characters,
                "tokens": split.tokens,
                "rows": split.rows,
                "dropped_tokens": split.dropped_tokens,
                "dropped_share": _share(split.dropped_tokens, split.tokens),
                "padding_tokens": split.padding_tokens,
                "padding_share": _share(split.padding_tokens, split.rows * manifest.length),
            }
            for name, split in manifest.splits.items()
        },
        "documents_by_length": [  # from 0 tokens, and then from each power of two on
            {"from": 2 ** (k - 1) if k else 0, "to": 2**k - 1, "documents": int(n)} for k, n in enumerate(lengths)
        ],
        "most_frequent_tokens": _most_frequent(sum(counted, np.zeros(words.size, np.int64)), words) if counted else [],
        "longest_documents": [{"tokens": size, "name": name} for size, name in longest[:LONGEST]],
        "truncated_documents": sum(tally.truncated for tally in tallies),
        "rejected": manifest.rejected,
        "rejected_examples": joined_examples(record.rejects.examples for record in records),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _most_frequent(counts: np.ndarray, words: Vocabulary) -> list[dict[str, Any]]:
    total = counts.sum()
    best = np.argsort(-counts, kind="stable")[:_FREQUENT]
    return [
        {"token": int(token), "text": words.decode(np.array([token])), "count": int(n), "share": int(n) / int(total)}
        for token in best
        if (n := counts[token])
    ]


def write(root: Folder, report: dict[str, Any]) -> None:
    """Write both forms."""
    root.write(JSON_FILE, json.dumps(report, indent=1, ensure_ascii=False).encode(errors="replace") + b"\n")
    root.write(MARKDOWN_FILE, markdown(report).encode(errors="replace"))


def load(root: Place) -> dict[str, Any] | None:
    """The report of a prepared set; None where there is none that can be read: earlier versions wrote none."""
    try:
        found = json.loads(Folder(root).read(JSON_FILE))
    except UserError:  # the storage does not answer
        raise
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def brief(report: dict[str, Any] | None) -> list[str]:
    """What stands out, in a few lines."""
    if report is None:
        return []
    lines = []
    if found := report["most_frequent_tokens"]:
        lines.append(_fact("most frequent", ", ".join(f"{one['text']!r} {one['share']:.1%}" for one in found[:5])))
    if found := report["longest_documents"]:
        lines.append(_fact("longest", ", ".join(f"{one['name']} ({one['tokens']:,} tokens)" for one in found[:3])))
    if count := report["truncated_documents"]:
        lines.append(_fact("truncated", f"{count:,} documents"))
    if padding := report["splits"].get("train", {}).get("padding_share"):
        lines.append(_fact("padding", f"{padding:.1%} of the training rows"))
    return lines


def _fact(name: str, value: str) -> str:
    return f"{name:<14}{value}"


def markdown(report: dict[str, Any]) -> str:
    """All of it, for reading."""
    source = report["source"]
    lines = [
        f"# {source['identity']}",
        "",
        f"{source['units']:,} units, {source['bytes']:,} bytes; packing {report['packing']}; fingerprint "
        f"{report['fingerprint']}",
        "",
    ]
    names = ("documents", "characters", "tokens", "rows", "dropped_tokens", "padding_tokens")
    lines += _table(
        ["split", "documents", "characters", "tokens", "rows", "dropped", "padding"],
        [
            [name, *(f"{split[column]:,}" for column in names[:4])]
            + [f"{split[f'{what}_tokens']:,} ({split[f'{what}_share']:.2%})" for what in ("dropped", "padding")]
            for name, split in report["splits"].items()
        ],
    )
    if bins := report["documents_by_length"]:
        most = max(one["documents"] for one in bins)
        lines += ["## Documents by their tokens", ""]
        lines += _table(
            ["tokens", "documents", ""],
            [
                [f"{one['from']:,} to {one['to']:,}", f"{one['documents']:,}", _bar(one["documents"], most)]
                for one in bins
                if one["documents"]
            ],
        )
    if found := report["most_frequent_tokens"]:
        lines += ["## Most frequent tokens of the train split", ""]
        lines += _table(
            ["token", "text", "count", "share"],
            [[str(one["token"]), _code(one["text"]), f"{one['count']:,}", f"{one['share']:.3%}"] for one in found],
        )
    if found := report["longest_documents"]:
        lines += ["## Longest documents", ""]
        lines += _table(["tokens", "document"], [[f"{one['tokens']:,}", _code(one["name"])] for one in found])
    lines += ["## Rejected", ""]
    if rejected := report["rejected"]:
        lines += _table(
            ["reason", "records", "for example"],
            [
                [reason, f"{count:,}", "; ".join(map(_code, report["rejected_examples"].get(reason, [])))]
                for reason, count in rejected.items()
            ],
        )
        lines += ["All of them, with their beginnings: `rejects/*.jsonl.zst`.", ""]
    else:
        lines += ["Nothing.", ""]
    if count := report["truncated_documents"]:
        lines += [f"{count:,} documents were cut to their first characters (`max_chars`).", ""]
    if speed := report["tokens_per_second"]:
        lines += [f"{report['seconds']:,.1f} s, {speed:,.0f} tokens/s.", ""]
    return "\n".join(lines)


def _table(columns: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)] + [""]


def _bar(count: int, most: int) -> str:
    return "█" * -(-count * _BAR // most)


def _code(text: str) -> str:
    """Text that may hold anything, in one cell of a table."""
    return "`" + repr(text)[1:-1].replace("`", "'").replace("|", "\\|") + "`"
