"""The size ledger: lines of code by room, and a failure where a file has outgrown one noun.

    python tests/ledger.py

A file over its limit is split by noun. Kernels are long by nature and have a limit of their own.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "rorqual"
LIMIT = 500
KERNEL_LIMIT = 800


def lines(path: Path) -> int:
    return sum(1 for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def main() -> int:
    rooms: Counter[str] = Counter()
    too_long = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0]
        count = lines(path)
        rooms[room] += count
        limit = KERNEL_LIMIT if room == "kernels" else LIMIT
        if count > limit:
            too_long.append(f"{path.relative_to(PACKAGE)}: {count} lines, limit {limit}: split it by noun")
    for room, count in rooms.most_common():
        print(f"{count:7d}  {room}")
    print(f"{sum(rooms.values()):7d}  in all")
    print(*too_long, sep="\n", end="\n" if too_long else "")
    return 1 if too_long else 0


if __name__ == "__main__":
    sys.exit(main())
