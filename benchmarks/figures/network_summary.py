"""README's table and picture of the whole network: what is counted of it, part by part, beside eager's floors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.cases.counted_network import FILE, PLACE, WORDS, header, row
from benchmarks.figures import network_picture
from benchmarks.figures.counted_summary import REPORT, read
from benchmarks.figures.gpu_report import _table as markdown_table
from benchmarks.figures.result_files import COUNTED

COMMAND = f"python benchmarks/counted.py --network --json benchmarks/results/{COUNTED}/{FILE} --commit HASH"
PICTURE = "network.png"

SHOWN = {name: network_picture.POINT[name] for name in PLACE[:2]}
"""What README's table is of: the picture's card and dtype."""


def network_summary(results: Path) -> str:
    """The sums over the network's parts, and the picture of one point. "" where nothing was counted.

    Raises ResultFileError for a file that cannot be used.
    """
    data = _read(results)
    if data is None:
        return ""
    rows = [row(point)[len(SHOWN) :] for point in data["points"] if all(point[name] == SHOWN[name] for name in SHOWN)]
    return (
        "**The whole network, counted and not measured**: GoogLeNet of grey images and 10 classes on the "
        f"{SHOWN['card']} in {SHOWN['dtype']}, microseconds, commit {data['commit']}. {WORDS} Every other card and "
        f"dtype, and every part, stand in [report.md](benchmarks/results/{COUNTED}/{REPORT}); "
        f"`python -m inception_fused plan --network` shows any point, `{COMMAND}` counts again."
        f"\n\n{markdown_table(header(data)[len(SHOWN) :], rows)}\n\n![{network_picture.WORDS}](docs/{PICTURE})"
        "\n\nHatched is a floor, which no kernel beats and eager's do not reach; plain is a forecast. A length of one "
        "kind over a length of the other is no speed-up."
    )


def draw(results: Path, folder: Path) -> str:
    """The picture, drawn into a folder: its Markdown, or a sentence why it was not drawn. Raises ResultFileError, and
    MissingLibraryError without matplotlib."""
    data = _read(results)
    if data is None:
        return f"The whole network: not drawn, `{COMMAND}` has not counted it."
    network_picture.draw_network(data, folder / PICTURE)
    return f"![{network_picture.WORDS}]({PICTURE})"


def _read(results: Path) -> dict[str, Any] | None:
    return read(results / COUNTED / FILE, COMMAND)
