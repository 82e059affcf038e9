"""What `select_targets` returns: names of modules, and a table that says what they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fvlm_core.arch import Part, Tower


@dataclass(frozen=True, slots=True)
class TargetRow:
    """One tower and part of the table.

    Attributes:
        tower: vision, projector, language, audio or head.
        part: attention, mlp or other.
        modules: how many of its linears are selected.
        of: how many it has.
        parameters: of the selected linears themselves (not of the adapters on them).
    """

    tower: Tower
    part: Part
    modules: int
    of: int
    parameters: int


@dataclass(frozen=True, slots=True)
class TargetTable:
    """What was selected of every tower and part that the model has; its string is a table for people."""

    rows: tuple[TargetRow, ...]

    def __str__(self) -> str:
        cells = [("tower", "part", "modules", "parameters")]
        cells += [(row.tower, row.part, f"{row.modules} of {row.of}", f"{row.parameters:,}") for row in self.rows]
        total = sum(row.modules for row in self.rows), sum(row.of for row in self.rows)
        cells.append(("total", "", f"{total[0]} of {total[1]}", f"{sum(row.parameters for row in self.rows):,}"))
        widths = [max(len(line[column]) for line in cells) for column in range(4)]
        lines = []
        for tower, part, modules, parameters in cells:
            left = f"{tower:<{widths[0]}}  {part:<{widths[1]}}"
            lines.append(f"{left}  {modules:>{widths[2]}}  {parameters:>{widths[3]}}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Selection:
    """The modules that get an adapter.

    Attributes:
        modules: their full dotted names in the task model, in the order of its module tree.
        table: what they are, tower by tower.
    """

    modules: tuple[str, ...]
    table: TargetTable

    def __str__(self) -> str:
        return str(self.table)
