"""`python -m bench` measures everything and rewrites README.md's table; with a name, one part."""

import argparse
import time
from datetime import UTC, datetime

from bench import (
    claiming,
    fairness,
    fanout,
    latency,
    machine,
    memory,
    polling,
    reception,
    relay,
    start,
    starvation,
    table,
)

PARTS = {
    module.PART: module.run
    for module in (
        reception,
        latency,
        relay,
        fairness,
        starvation,
        claiming,
        fanout,
        memory,
        start,
        polling,
    )
}


def main() -> None:
    """Run the parts that are asked for and print their table."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="NAME", help=f"{', '.join(PARTS)}; none: all")
    names = parser.parse_args().parts
    if unknown := set(names) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    rows, others = [], []
    for name in names or PARTS:
        began = time.monotonic()
        with machine.noise() as noise:
            rows += PARTS[name]()
        others.append(f"{name} {noise[0]:.0%}")
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    today = datetime.now(UTC).date().isoformat()
    text = (
        f"\n{today}: {machine.describe()}.\n"
        f"What other programs took of the cores meanwhile: {', '.join(others)}.\n\n{table.render(rows)}\n"
    )
    print(text)
    if not names:
        table.write(text)


if __name__ == "__main__":
    main()
