"""A comparison as a page of Markdown: what ran, what each engine said of itself, and the ratios."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenspeed.bench.compare.engines import Engine
from tokenspeed.bench.compare.rounds import Comparison
from tokenspeed.bench.record import Record, Surroundings

TOLD_AT_MOST = 60
"""Lines of what an engine says of itself."""


def page(found: Sequence[Comparison], made: Sequence[Record], engines: Sequence[Engine], around: Surroundings) -> str:
    """The whole page. made: the records of the steps that have some."""
    machine = around["machine"]
    gpus = f", {machine.gpus} x {machine.gpu}" if machine.gpu else ""
    place = f"{machine.cpu}, {machine.cores} cores, {machine.memory_gib:g} GiB{gpus}"
    versions = ", ".join(f"{name} {of}" for name, of in around["versions"].items())
    lines = [
        f"# {', '.join(each.name for each in engines)}: {found[0].step.workload}",
        "",
        f"    {around['command']}",
        "",
        f"{place}, {around['date']}, commit {around['commit'] or 'unknown'}; {versions}.",
        f"Ratios are to `{engines[-1].name}`: the median over rounds, and an interval for it.",
        "",
        "## Engines",
    ]
    for engine in engines:
        lines += _engine(engine)
    for each in found:
        lines += _step(each, [record for record in made if record.id.startswith(f"{each.step.id}.")], engines)
    return "\n".join(lines) + "\n"


def _engine(engine: Engine) -> list[str]:
    lines = ["", f"### {engine.name}: version {engine.version}", "", f"    {engine.shown}", ""]
    if not engine.told:
        return [*lines, "It says nothing of itself."]
    shown = list(engine.told.items())[:TOLD_AT_MOST]
    left = len(engine.told) - len(shown)
    told = ", ".join(f"`{name}` {value}" for name, value in shown)
    return [*lines, f"It says: {told}{f', and {left} values more' if left else ''}."]


def _step(found: Comparison, made: Sequence[Record], engines: Sequence[Engine]) -> list[str]:
    settings = ", ".join(f"{name} {value}" for name, value in found.step.settings().items())
    lines = ["", f"## {found.step.id}", "", f"{settings}.", ""]
    if found.differences:
        return [*lines, "**Not the same work, so no ratio:**", *(f"- {each}" for each in found.differences)]
    runs = [each for outcomes in found.outcomes.values() for each in outcomes]
    drift = max(each.calibration_s for each in runs) / min(each.calibration_s for each in runs)
    (prompts, answers), requests = _work(found), next(iter(found.outcomes.values()))[0].work.total()
    counts = f"{prompts} prompt and {answers} output tokens in the first"
    lines += [
        f"Each engine answered {requests} requests a round, by its own count of {counts}.",
        f"The calibration loop's slowest run took {drift:.2f} times its fastest.",
        *_clocks(found),
        *(f"Warning: {each}." for each in sorted({remark for run in runs for remark in run.remarks})),
        "",
    ]
    heads = [each.name for each in engines[:-1]]
    lines.append(f"| | {' | '.join(f'{name} | ratio' for name in heads)} | {engines[-1].name} |")
    lines.append("|---" * (2 * len(heads) + 2) + "|")
    return lines + list(_rows(found, made, heads, engines[-1].name))


def _rows(found: Comparison, made: Sequence[Record], heads: Sequence[str], last: str) -> Iterable[str]:
    by_id = {record.id: record for record in made}
    prefix = f"{found.step.id}.{last}."
    for record in made:
        if record.id.startswith(prefix):
            figure = record.id.removeprefix(prefix)
            cells = []
            for name in heads:
                other = by_id[f"{found.step.id}.{name}.{figure}"]
                cells += [f"{other.value:.4g} {other.unit}", _ratio(other)]
            yield f"| {figure} | {' | '.join(cells)} | {record.value:.4g} {record.unit} |"


def _ratio(record: Record) -> str:
    of = record.ratio
    if of is None:
        return ""
    return f"{of.median:.2f} ({of.low:.2f} to {of.high:.2f}, {of.count} rounds, {of.confidence:.0%})"


def _work(found: Comparison) -> tuple[int, int]:
    work = next(iter(found.outcomes.values()))[0].work
    prompts, answers = (sum(pair[place] * count for pair, count in work.items()) for place in (0, 1))
    return prompts, answers


def _clocks(found: Comparison) -> list[str]:
    first = next(iter(found.outcomes.values()))[0].clocks
    said = ", ".join(f"{name} {value}" for name, value in first.items())
    return [f"Clocks before the first run: {said}."] if said else ["The machine does not tell its clocks."]
