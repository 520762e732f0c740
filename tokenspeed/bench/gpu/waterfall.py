"""A decode step as a table of kernels that adds up: by how much each moves the end of everything forward.

What the device does is taken from a profile. Kernels overlap (programmatic dependent launch), so a kernel's duration
says little: its advance is the time from the latest end before it, or its start where that is later, to its own end;
idle is the time before its start in which nothing ran. All advances and idles together are the span.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

STEPS = 24
"""Steps that are averaged."""
LAST_KERNEL = "_finish"
"""The last kernel of a step."""
COPIES = ("Memcpy", "Memset")


class Launch(NamedTuple):
    """Something that the device did: microseconds."""

    name: str
    start: float
    end: float


class Label(NamedTuple):
    """A kernel of a step, in order of launch, and the op that launches it."""

    op: str
    kernel: str


@dataclass
class Line:
    """A kernel of an op, over some steps: launches, and microseconds in all."""

    op: str
    kernel: str
    count: int = 0
    duration: float = 0.0
    advance: float = 0.0
    idle: float = 0.0

    def add(self, launch: Launch, end: float) -> None:
        """One launch, after everything before it has ended at `end`."""
        self.count += 1
        self.duration += launch.end - launch.start
        self.advance += max(0.0, launch.end - max(end, launch.start))
        self.idle += max(0.0, launch.start - end)


@dataclass(frozen=True)
class Waterfall:
    """Lines in order of their first launch; `span` microseconds over `steps` steps. unlike: what a step has launched
    more or less often than was walked, where ops are not known for that."""

    lines: list[Line]
    steps: int
    span: float
    unlike: str = ""

    def text(self) -> str:
        """As a table of microseconds per step, the largest first."""
        head = f"{'count':>7} {'duration':>9} {'advance':>9} {'idle':>8} {'each':>7}  op, kernel (us per step)"
        ordered = sorted(self.lines, key=lambda line: -line.advance - line.idle)
        rows = [head, *(self._row(line) for line in ordered)]
        advance, idle = sum(line.advance for line in self.lines), sum(line.idle for line in self.lines)
        rows.append(
            f"{'':7} {'':9} {advance / self.steps:9.1f} {idle / self.steps:8.1f} {'':7}  "
            f"span {self.span / self.steps:.1f} us per step"
        )
        if self.unlike:
            rows.append(f"the graph's kernels are not those of the step as it was walked ({self.unlike}): no ops")
        return "\n".join(rows)

    def samples(self) -> dict[str, list[float]]:
        """Per line: count, duration, advance, idle per step."""
        return {
            f"{line.op} {line.kernel[:60]}": [
                round(each / self.steps, 3) for each in (line.count, line.duration, line.advance, line.idle)
            ]
            for line in self.lines
        }

    def _row(self, line: Line) -> str:
        each = (line.advance + line.idle) / line.count
        n = self.steps
        return (
            f"{line.count / n:7.1f} {line.duration / n:9.1f} {line.advance / n:9.1f} {line.idle / n:8.1f} {each:7.2f}  "
            f"{line.op}, {line.kernel[:70]}"
        )


def middle_steps(launches: Sequence[Launch], steps: int = STEPS) -> tuple[Launch, list[list[Launch]]]:
    """Of a run, in order of start: the launch that ends the step before, and the launches of `steps` steps in its
    middle, where all sequences decode. Raises ValueError where the run has too few."""
    ends = [at for at, launch in enumerate(launches) if launch.name.startswith(LAST_KERNEL)]
    first = (len(ends) - steps) // 2
    if first < 0 or len(ends) < steps + 1:
        raise ValueError(f"a run of {len(ends)} steps, {steps + 1} are needed")
    chosen = ends[first : first + steps + 1]
    return launches[chosen[0]], [list(launches[a + 1 : b + 1]) for a, b in pairwise(chosen)]


def waterfall(before: Launch, steps: Sequence[Sequence[Launch]], labels: Sequence[Label] = ()) -> Waterfall:
    """The table of some steps that follow each other; `labels` are those of one step, copies left out: the first
    launch of a kernel in a step has the first label with its name, and so on, as the profiler's clock is too coarse to
    tell which of two kernels began first."""
    unlike = next(filter(None, (difference(step, labels) for step in steps)), "") if labels else ""
    lines: dict[tuple[str, str], Line] = {}
    end = before.end
    for step in steps:
        ops: dict[str, deque[str]] = defaultdict(deque)
        for label in labels:
            ops[label.kernel].append(label.op)
        for launch in step:
            known = labels and not unlike
            op = "copy" if is_copy(launch) else ops[launch.name].popleft() if known else ""
            lines.setdefault((op, launch.name), Line(op, launch.name)).add(launch, end)
            end = max(end, launch.end)
    return Waterfall(list(lines.values()), len(steps), end - before.end, unlike)


def difference(step: Sequence[Launch], labels: Sequence[Label]) -> str:
    """The first kernel that a step launches more or less often than the labels say; "" for none."""
    found, walked = Counter(each.name for each in step if not is_copy(each)), Counter(each.kernel for each in labels)
    names = (name for name in [*walked, *found] if found[name] != walked[name])
    return next((f"{name[:70]}: {found[name]} for {walked[name]}" for name in names), "")


def is_copy(launch: Launch) -> bool:
    """Whether it is a transfer, and no kernel."""
    return launch.name.startswith(COPIES)


def labels_between(launches: Iterable[Launch], mark: str, ops: Sequence[str]) -> list[Label]:
    """Labels of a step that was walked with a launch of `mark` before each op: `ops` names what comes before the first
    mark, then what follows each. Raises ValueError where the marks are not as many."""
    found: list[Label] = []
    at = 0
    for launch in launches:
        if launch.name.startswith(mark):
            at += 1
        elif not is_copy(launch) and at < len(ops):
            found.append(Label(ops[at], launch.name))
    if at != len(ops) - 1:
        raise ValueError(f"{at} marks in the profile for {len(ops)} ops")
    return found


def role(op: str, weights: Sequence[str]) -> str:
    """An op by its place in a layer: its kind and its matrix, without the layer's number, which comes last of its
    weights unless it has a bias."""
    named = [name.split(".")[-1] for name in weights]
    matrices = [name for name in named if not name.endswith(("norm", "bias"))]
    return " ".join([op, *matrices[-1:]])
