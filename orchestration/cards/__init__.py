"""Model cards, written from the facts that a run or an exported folder holds; what isn't known is said to be absent.

facts = cards.of_run(Path("runs/mine"))          # or of_folder, of an exported model or a version of a registry
cards.write(folder, facts)                       # card.md, card.html, card/*.png
"""

from orchestration.cards.collect import of, of_folder, of_run
from orchestration.cards.facts import NOT_STATED, CardFacts, Licences
from orchestration.cards.render import html, markdown, write

__all__ = ["NOT_STATED", "CardFacts", "Licences", "html", "markdown", "of", "of_folder", "of_run", "write"]
