"""Writes the table of manifest keys into docs/manifests.md, or checks that it is there and current.

python scripts/manifest_docs.py           write
python scripts/manifest_docs.py --check   exit 1 when the file would change
"""

import sys
from pathlib import Path

from orchestrator.manifest.fields import rows

DOCS = Path(__file__).parent.parent / "docs" / "manifests.md"
BEGIN = "<!-- keys: written by scripts/manifest_docs.py -->"
END = "<!-- end of keys -->"


def table() -> str:
    """All keys as a Markdown table."""
    lines = ["| key | allowed | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{row.path}` | {row.allowed} | {row.default} | {row.description} |" for row in rows()]
    return "\n".join(lines)


def with_table(text: str) -> str:
    """The page with the table between its markers. Raises ValueError when a marker is missing."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{DOCS} lacks the marker {BEGIN!r} or {END!r}")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Write or check; returns the exit code."""
    text = DOCS.read_text(encoding="utf-8")
    wanted = with_table(text)
    if arguments == ["--check"]:
        if text != wanted:
            print(f"{DOCS} is out of date; run: python scripts/manifest_docs.py", file=sys.stderr)
            return 1
        return 0
    if arguments:
        print(__doc__, file=sys.stderr)
        return 2
    DOCS.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
