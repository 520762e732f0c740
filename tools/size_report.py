"""Lines per room, the largest files and functions; exits with 1 when one is over its limit.

A file may have 500 lines, a function 60, counted from `def` to its last line. Tests are held to the first limit only.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
ROOTS = ("tokenspeed", "tools", "tests", "benchmarks")
SUFFIXES = frozenset({".py", ".c", ".cc", ".cpp", ".h", ".hpp", ".cu", ".cuh"})


class Size(NamedTuple):
    lines: int
    name: str


def source_files(root: Path) -> list[Path]:
    """Python, C++ and CUDA files below the source roots, as paths relative to `root`."""
    found = (path for top in ROOTS for path in (root / top).rglob("*") if path.suffix in SUFFIXES and path.is_file())
    return sorted(path.relative_to(root) for path in found)


def room_of(path: Path) -> str:
    """`tokenspeed/ops/rope.py` belongs to `tokenspeed/ops`; a file directly below a root, to that root."""
    return "/".join(path.parts[:-1][:2])


def functions(source: str, path: Path) -> Iterator[Size]:
    """Every function and method of a Python file, nested ones too."""
    for node in ast.walk(ast.parse(source, str(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            yield Size(node.end_lineno - node.lineno + 1, f"{path}:{node.lineno} {node.name}")


def measure(root: Path) -> tuple[Counter[str], list[Size], list[Size]]:
    """Lines per room; files and functions, largest first (functions without those of tests)."""
    rooms: Counter[str] = Counter()
    file_sizes: list[Size] = []
    function_sizes: list[Size] = []
    for path in source_files(root):
        source = (root / path).read_text(encoding="utf-8")
        lines = len(source.splitlines())
        rooms[room_of(path)] += lines
        file_sizes.append(Size(lines, str(path)))
        if path.suffix == ".py" and path.parts[0] != "tests":
            function_sizes.extend(functions(source, path))
    return rooms, sorted(file_sizes, reverse=True), sorted(function_sizes, reverse=True)


def print_table(title: str, sizes: list[Size]) -> None:
    print(title)
    for size in sizes:
        print(f"{size.lines:7,}  {size.name}")


def main(argv: list[str] | None = None) -> int:
    """Print the report; 0 when every file and function is within its limit, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--top", type=int, default=5, help="how many of the largest to print (default 5)")
    parser.add_argument("--quiet", action="store_true", help="print only what is over a limit")
    args = parser.parse_args(argv)

    rooms, file_sizes, function_sizes = measure(args.root)
    if not args.quiet:
        print_table("lines per room", [Size(lines, room) for room, lines in sorted(rooms.items())])
        print_table(f"largest files (limit {MAX_FILE_LINES})", file_sizes[: args.top])
        print_table(f"largest functions (limit {MAX_FUNCTION_LINES})", function_sizes[: args.top])
    over = [
        f"{size.name}: {size.lines} lines, limit {MAX_FILE_LINES}" for size in file_sizes if size.lines > MAX_FILE_LINES
    ]
    over += [
        f"{size.name}: {size.lines} lines, limit {MAX_FUNCTION_LINES}"
        for size in function_sizes
        if size.lines > MAX_FUNCTION_LINES
    ]
    for line in over:
        print(f"too long: {line}", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
