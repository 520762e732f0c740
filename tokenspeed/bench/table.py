"""The tables of docs/benchmarks.md and of the README, from the records and the peers' figures alone:
`python -m tokenspeed.bench.table` rewrites them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenspeed.bench import peer_table
from tokenspeed.bench.record import Record, Target, read
from tokenspeed.contracts.errors import FormatError

PAGE, README = Path("docs/benchmarks.md"), Path("README.md")
RESULTS = Path("benchmarks/results")
BEGIN, END = "<!-- tables: begin, written by python -m tokenspeed.bench.table -->", "<!-- tables: end -->"
HEADER = "| id | ours | floor (share) | peer | ratio or runs | target | | bus_share |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrite the tables of both pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=PAGE, help="default: %(default)s")
    parser.add_argument("--readme", type=Path, default=README, help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of records (default: %(default)s)")
    options = parser.parse_args(arguments)
    files = read_all(options.results)
    options.page.write_text(updated(options.page.read_text(), files))
    options.readme.write_text(updated_readme(options.readme.read_text(), files))


def read_all(folder: Path) -> dict[str, list[Record]]:
    """The records of every file of a folder, by its name. Raises FormatError where one holds something else."""
    return {path.name: read(path) for path in sorted(folder.glob("*.json"))}


def updated(page: str, files: Mapping[str, Sequence[Record]]) -> str:
    """The page with fresh tables between its markers. Raises FormatError where it lacks one."""
    return _between(page, "\n".join(filter(None, [peer_table.section(files), *map(section, files, files.values())])))


def updated_readme(page: str, files: Mapping[str, Sequence[Record]]) -> str:
    """The README with a fresh table of ratios between the same markers. Raises FormatError where it lacks one."""
    return _between(page, peer_table.ratios(files))


def _between(page: str, tables: str) -> str:
    before, begin, rest = page.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if not begin or not end:
        raise FormatError(f"the page needs a line {BEGIN!r} and after it a line {END!r}")
    return before + begin + tables + end + after


def section(name: str, records: Sequence[Record]) -> str:
    """Heading, where it was measured, one line per record."""
    places = sorted({f"{each.machine.cpu}, {each.machine.cores} cores, {each.date}" for each in records})
    commits = sorted({(each.commit or "no commit")[:10] for each in records})
    lines = [f"### {name}", f"{'; '.join(places)}. Commit {', '.join(commits)}.", "", HEADER, "|---" * 8 + "|"]
    return "\n".join([*lines, *map(line, records)]) + "\n"


def line(record: Record) -> str:
    """One record as a row: `value unit`, floor and share, the peer's, the ratio or spread of runs, ..."""
    peer = "" if record.peer_value is None or not record.peer else f"{record.peer_value:.4g} ({_short(record.peer)})"
    share = "" if record.bus_share is None else f"{record.bus_share:.0%}"
    verdict = {None: "", True: "met", False: "**missed**"}[record.met()]
    values = [f"{record.value:.4g} {record.unit}", _floor(record), peer]
    cells = [record.id, *values, _spread(record), _target(record), verdict, share]
    return f"| {' | '.join(cells)} |"


def _floor(record: Record) -> str:
    return "" if record.floor is None or record.share is None else f"{record.floor:.4g} ({record.share:.0%})"


def _short(peer: str) -> str:
    return peer.split()[0].rstrip(":,")


def _spread(record: Record) -> str:
    if record.ratio is not None:
        ratio = record.ratio
        return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f}, {ratio.count} pairs)"
    if record.runs is not None:
        return f"{record.runs.minimum:.4g} to {record.runs.maximum:.4g}, {record.runs.count} runs"
    return ""


def _target(record: Record) -> str:
    target: Target | None = record.target
    if target is None:
        return ""
    name = "" if target.of == "value" else f"{target.of} "
    return f"{name}≥ {target.at_least:g}" if target.at_least is not None else f"{name}≤ {target.at_most:g}"


if __name__ == "__main__":
    main()
