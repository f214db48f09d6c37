"""Where rows came from, as messages name it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Place:
    """A split and its files; as text, its name.

    Attributes:
        name: for what concerns the whole split.
        files: each with its number of rows, in order; empty if the rows come from no files.
    """

    name: str
    files: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return self.name

    def row(self, row: int) -> str:
        """Name a row of the split: `b.csv, row 3`, counted from 1 in its own file.

        Args:
            row: its position in the split.
        """
        where = self.name
        for file, num_rows in self.files:
            where = file
            if row < num_rows:
                break
            row -= num_rows
        return f"{where}, row {row + 1}"
