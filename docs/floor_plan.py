"""The rooms of the package on their floors, with the imports between them, read from the source.

An arrow that other arrows imply is left out: what remains is the fewest arrows that say the same.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from drawing import BLUE, GREY, INK, Drawing

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the one table of floors is the test that holds it

from test_layering import FLOOR, FLOORS, edges_of, module_name, room, sources  # noqa: E402

WIDTH, BAND, HIGH, LEFT = 860, 66, 34, 150
MEANING = (
    "what everybody may raise",
    "what is asked for, what is held",
    "arithmetic, graphs, files",
    "what ids prove",
    "models, quantizers",
    "stored, measured, PT2E",
    "resumed, loaded, lowered",
    "walked, evaluated",
    "passes, reports",
    "steps in order",
    "what users call",
    "the program's commands",
    "its arguments",
    "doors",
)


def imported_rooms() -> dict[str, set[str]]:
    """The rooms that each room imports."""
    trees = {module_name(path): ast.parse(text) for path, text in sources().items()}
    rooms: dict[str, set[str]] = {name: set() for name in FLOOR}
    for module, _, target, _ in edges_of(trees):
        if room(module) != room(target):
            rooms[room(module)].add(room(target))
    return rooms


def without_implied(rooms: dict[str, set[str]]) -> dict[str, set[str]]:
    """The transitive reduction: an import that another imported room has anyway is left out."""

    def below(name: str) -> set[str]:
        return rooms[name].union(*(below(lower) for lower in rooms[name]))

    return {
        name: lower - set().union(*(below(other) for other in lower))
        for name, lower in rooms.items()
    }


def floors() -> Drawing:
    """Every room on its floor, and the imports that no other import implies."""
    d = Drawing(WIDTH, BAND * len(FLOORS) + 10, "The rooms of qwt-fx and who imports whom")
    files = sources()
    place: dict[str, tuple[float, float]] = {}
    for floor, names in enumerate(FLOORS):
        top = BAND * (len(FLOORS) - 1 - floor) + 12
        step = (WIDTH - LEFT - 20) / len(names)
        d.text(14, top + HIGH / 2 + 4.5, f"{floor}  {MEANING[floor]}", color=GREY, anchor="start")
        # Every other floor stands half a box to the side, so that arrows pass between boxes.
        shift = 26 if floor % 2 else -26
        for at, name in enumerate(names):
            place[name] = (LEFT + 40 + step * (at + 0.5) + shift, top)
    for name, lower in without_implied(imported_rooms()).items():
        for other in sorted(lower):
            (x, y), (to, bottom) = place[name], place[other]
            d.line([(x, y + HIGH), (to, bottom)], GREY, width=1.0)
    for name, (x, top) in place.items():
        count = sum(1 for path in files if room(module_name(path)) == name)
        words = f"{name}.py" if count == 1 and name not in ("pt2e",) else f"{name}/  {count}"
        d.box(x - 66, top, 132, HIGH, words, INK if count == 1 else BLUE)
    return d
