"""What GenMD4 has learned about the order of tokens: its powers as a table and a picture.

A token of power p is hidden by time t with probability t^p. Sampling runs through time backwards, from 1 to 0, and a
token appears at a random time T with P(T <= t) = t^p. Hence, of the tokens that a sample will hold:

    a LARGE power means hidden late, REVEALED EARLY when sampling: half of its occurrences are there by t = 2^(-1/p)
    a small power means hidden early, revealed late

Of two occurrences with powers p and q the first appears before the second with probability p / (p + q). Only ratios
matter to the order: multiplying all powers by one number renames the times and changes nothing else.
"""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from md4.errors import UserError
from pipelines.storage import write_atomically
from pipelines.vocabularies import Vocabulary

Names = Callable[[int], str]  # of a token
SHOWN = 64  # a longer vocabulary is shown by its two ends


def token_names(vocabulary: Vocabulary) -> Names:
    """How the table writes a token: its text in quotes, or `#id` where there is none to be had.

    To be called once: a vocabulary whose files are not on this machine may look for them for half a minute.
    """
    try:
        vocabulary.decode(np.array([0]))
        readable = vocabulary.size
    except UserError:
        readable = 0
    return lambda token: repr(vocabulary.decode(np.array([token]))) if token < readable else f"#{token}"


def by_order(powers: Sequence[float]) -> list[int]:
    """Token ids from the one revealed first to the one revealed last."""
    return sorted(range(len(powers)), key=lambda token: -powers[token])


def table(powers: Sequence[float], name: Names, title: str) -> str:
    """The powers as Markdown, the tokens revealed first on top; of a long vocabulary the two ends."""
    order, mean = by_order(powers), sum(powers) / len(powers)
    left_out = len(order) - SHOWN if len(order) > SHOWN else 0
    rows = [
        "| {} | {} | {} | {:.4f} | {:.3f} | {:.1%} |".format(
            place + 1,
            token,
            name(token).replace("|", "\\|"),
            powers[token],
            2 ** (-1 / powers[token]),
            powers[token] / (powers[token] + mean),
        )
        for place, token in enumerate(order)
    ]
    if left_out:
        rows[SHOWN // 2 : SHOWN // 2 + left_out] = [f"| ... | {left_out:,} more | ... | ... | ... | ... |"]
    return "\n".join(
        [
            f"# {title}",
            "",
            "GenMD4 hides a token by time t with probability t^power. A large power means: hidden late, and so "
            "**revealed early** when sampling, which runs from t = 1 to t = 0.",
            "",
            f"Powers from {min(powers):.4f} to {max(powers):.4f}, mean {mean:.4f}; all equal would mean that "
            "nothing was learned, or that there is nothing to learn.",
            "",
            "- *half by t*: half of the token's occurrences in a sample are revealed while t is still above this "
            "value, 2^(-1/power).",
            "- *before average*: the chance that an occurrence is revealed before one of a token with the mean power.",
            "",
            "| order | id | token | power | half by t | before average |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def as_csv(powers: Sequence[float], name: Names) -> str:
    """All powers, by token id."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "token", "power"])
    writer.writerows((token, name(token), f"{power:.6g}") for token, power in enumerate(powers))
    return text.getvalue()


def draw(powers: Sequence[float], name: Names, title: str, path: Path) -> None:
    """A picture (PNG) at `path`: the powers in order, and how much of each token is revealed as sampling goes on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    order, count = by_order(powers), len(powers)
    ranked = np.array([powers[token] for token in order])
    few = count <= SHOWN
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, max(4.5, 0.17 * count) if few else 5), dpi=110, layout="constrained"
    )
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, count))
    if few:
        left.barh(range(count), ranked, color=colors)
        left.set_yticks(range(count), [name(token) for token in order], fontsize=8, fontfamily="monospace")
        left.invert_yaxis()
        left.set(xlabel="power", title="revealed first on top, last at the bottom")
    else:
        left.plot(range(1, count + 1), ranked, color="C0")
        left.set(xlabel="place in the order, revealed first on the left", ylabel="power", xscale="log", yscale="log")
        left.set_title("all tokens")
    (left.axvline if few else left.axhline)(ranked.mean(), color="0.5", lw=0.8, ls="--")

    t = np.linspace(1, 0, 201)
    for place in np.unique(np.linspace(0, count - 1, min(count, SHOWN)).astype(int)):
        right.plot(t, 1 - t ** ranked[place], color=colors[place], lw=1)
    for place, where in ((0, "first"), (count - 1, "last")):
        label = f"{where}: {name(order[place])}, power {ranked[place]:.3g}"
        right.plot(t, 1 - t ** ranked[place], color=colors[place], lw=3, label=label)
    right.invert_xaxis()
    right.set(xlabel="time t (sampling goes to the right)", ylabel="share already revealed, 1 - t^power")
    right.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    plt.close(figure)
    temporary.replace(path)


def write(powers: Sequence[float], name: Names, title: str, folder: Path) -> list[Path]:
    """Table, all numbers and picture as powers.md, powers.csv and powers.png in `folder`; returns their paths."""
    files = [folder / f"powers.{suffix}" for suffix in ("md", "csv", "png")]
    write_atomically(files[0], table(powers, name, title).encode())
    write_atomically(files[1], as_csv(powers, name).encode())
    draw(powers, name, title, files[2])
    return files
