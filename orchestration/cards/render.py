"""A card as Markdown with the front matter that hubs read, and as one HTML page that needs no other file."""

import base64
import html as escaping
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from md4.errors import UserError
from orchestration.cards.facts import CardFacts
from orchestration.cards.page import PAGE
from orchestration.cards.sections import Section, Table, headline, sections
from pipelines.storage import write_atomically

PICTURES = "card"  # folder of the Markdown's pictures
# General terms that the hub knows by an identifier, which is SPDX's in small letters.
_LICENCES = {
    "afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0",
    "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "ecl-2.0", "epl-1.0", "epl-2.0",
    "etalab-2.0", "eupl-1.1", "eupl-1.2", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "isc", "lgpl", "lgpl-2.1",
    "lgpl-3.0", "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1", "openrail",
    "osl-3.0", "pddl", "postgresql", "unlicense", "wtfpl", "zlib",
}  # fmt: skip


def write(folder: Path, facts: CardFacts) -> list[Path]:
    """Put card.md and card.html into a folder, and the Markdown's pictures into card/; returns the files.

    A card that is there is written anew. Raises `UserError` if the folder doesn't exist.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: a card goes into one that exists")
    files = {f"{PICTURES}/{picture.name}.png": picture.png for picture in facts.pictures}
    # The page last, and the pictures before the text that shows them.
    files |= {"card.md": markdown(facts).encode(), "card.html": html(facts).encode()}
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]


def markdown(facts: CardFacts) -> str:
    """With pictures as files below card/."""
    from huggingface_hub import ModelCard

    parts = [f"# {facts.name}", headline(facts), *([facts.about] if facts.about else [])]
    for section in sections(facts):
        parts += [f"## {section.title}", *_parts(section)]
    body = "\n\n".join(parts)
    return str(ModelCard(f"---\n{_front_matter(facts)}\n---\n\n{body}\n"))


def _parts(section: Section) -> list[str]:
    found = [*section.text, *map(_markdown_table, section.tables)]
    if section.items:
        found.append("\n".join(f"- {item}" for item in section.items))
    for quote in section.quotes:
        fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", quote.text)), default=0))
        found.append(f"{fence}\n{quote.text}\n{fence}\n{quote.note}")
    found += [f"![{picture.title}]({PICTURES}/{picture.name}.png)" for picture in section.pictures]
    return found or ["Nothing."]


def _markdown_table(table: Table) -> str:
    def line(cells: Any) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(table.head), line(["---"] * len(table.head)), *map(line, table.rows)])


def _front_matter(facts: CardFacts) -> str:
    """YAML for hubs, without any figure that the card doesn't show."""
    from huggingface_hub import EvalResult, ModelCardData

    task = "text-generation" if facts.model.kind == "text" else "unconditional-image-generation"
    results = [
        EvalResult(
            task_type=task,
            dataset_type=figure.data,
            dataset_name=figure.data,
            metric_type=figure.unit or figure.metric,
            metric_name=figure.metric,
            metric_value=figure.value,
        )
        for figure in facts.figures
    ]
    data = ModelCardData(
        model_name=facts.name,
        library_name="md4",
        pipeline_tag=task,
        tags=["masked-diffusion", facts.model.objective],
        eval_results=results or None,
        **_licence(facts.licences.weights),
    )
    return data.to_yaml().strip()


def _licence(name: str | None) -> dict[str, Any]:
    """A licence that isn't stated is left out; one that hubs don't know by an identifier is called other."""
    if name is None:
        return {}
    known = name.lower()
    return {"license": known} if known in _LICENCES else {"license": "other", "license_name": name}


def html(facts: CardFacts) -> str:
    """One page, pictures within."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["inline"] = lambda png: base64.b64encode(png).decode()
    environment.filters["code"] = _code
    page = environment.from_string(PAGE)
    given: Mapping[str, Any] = {"facts": facts, "headline": headline(facts), "sections": sections(facts)}
    return page.render(given)


def _code(text: str) -> Any:
    """Words between backticks as code; all else escaped."""
    from markupsafe import Markup

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", escaping.escape(text)))
