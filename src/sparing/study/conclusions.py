"""What a study concludes: how its arms came out against the baseline and against their matched controls."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator

from sparing.study.contrast import Difference
from sparing.study.results import Results
from sparing.study.tables import Table, tables_of

WORDS = {"better": "better", "worse": "worse", "other": "different", "same": "the same", "unsure": "not told apart"}


@dataclasses.dataclass(frozen=True)
class Conclusion:
    """One comparison of a study's tables.

    Attributes:
        where: model and task.
        figure: the figure.
        arm: label of the arm.
        other: label of what it is compared with.
        difference: the arm minus the other.
    """

    where: str
    figure: str
    arm: str
    other: str
    difference: Difference

    @property
    def place(self) -> tuple[str, str, str, str]:
        """What it is about, whatever came out."""
        return self.where, self.figure, self.arm, self.other


def conclusions_of(results: Results) -> dict[tuple[str, str, str, str], Conclusion]:
    """Every comparison that has an interval, once, in the order of the tables: place -> conclusion."""
    found: dict[tuple[str, str, str, str], Conclusion] = {}
    for table in tables_of(results):
        for each in _of_table(table):
            found.setdefault(each.place, each)
    return found


def _of_table(table: Table) -> Iterator[Conclusion]:
    base = next((arm.label for arm, _ in table.rows if arm.baseline), "the baseline")
    for arm, entries in table.rows:
        for column, entry in zip(table.columns, entries, strict=True):
            where = f"{column.model} · {column.task}"
            sides = [(base, entry.against), *((each.arm.label, each.difference) for each in entry.controls)]
            for other, difference in sides:
                if difference is not None and difference.low is not None:
                    yield Conclusion(where, column.figure, arm.label, other, difference)


def in_words(verdicts: Counter[str]) -> str:
    """`3 better, 1 not told apart`; empty where nothing was compared."""
    return ", ".join(f"{verdicts[verdict]} {word}" for verdict, word in WORDS.items() if verdicts[verdict])


def sentences_of(results: Results) -> list[tuple[str, str]]:
    """How the comparisons of each table came out, where there are any: question, `against dense: 3 worse; against ...`."""
    found = []
    for table in tables_of(results):
        base = next((arm.label for arm, _ in table.rows if arm.baseline), "the baseline")
        parts = [(f"against {base}", table.verdicts()), ("against matched controls", table.control_verdicts())]
        said = "; ".join(f"{name}: {in_words(verdicts)}" for name, verdicts in parts if verdicts)
        found += [(table.ask, said)] if said else []
    return found
