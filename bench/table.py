"""What a part hands back, and how it is shown."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

README = Path(__file__).with_name("README.md")
_BETWEEN = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- end of table -->)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Row:
    """One line: the median `figure`, its `spread` over the repetitions, and the goal.

    `met` None: no goal, the line is there for orientation.
    """

    part: str
    what: str
    figure: str
    spread: str = ""
    goal: str = ""
    met: bool | None = None


def measured(
    part: str, what: str, figures: Sequence[float], form: str, *, least: float | None = None,
    most: float | None = None,
) -> Row:  # fmt: skip
    """A row of repeated figures; `form` is a format string such as `{:.0f} ms`, used for the goal too."""
    middle = median(figures)
    spread = f"{form.format(min(figures))} – {form.format(max(figures))}" if len(figures) > 1 else ""
    if least is not None:
        return Row(part, what, form.format(middle), spread, f"≥ {form.format(least)}", middle >= least)
    if most is not None:
        return Row(part, what, form.format(middle), spread, f"≤ {form.format(most)}", middle <= most)
    return Row(part, what, form.format(middle), spread)


def render(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    met = {True: "yes", False: "**no**", None: ""}
    lines = ["| part | measured | figure | spread | goal | met |", "|---|---|--:|--:|--:|---|"]
    lines += [
        f"| {row.part} | {row.what} | {row.figure} | {row.spread} | {row.goal} | {met[row.met]} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def write(text: str) -> None:
    """Put `text` in the place of the table in README.md."""
    before = README.read_text(encoding="utf-8")
    after, count = _BETWEEN.subn(lambda _: text, before)
    if count != 1:
        raise RuntimeError(f"{README}: the two marks around the table are needed")
    README.write_text(after, encoding="utf-8")
