"""Tables in Markdown that are readable as text too."""

from collections.abc import Iterator, Sequence


def table(heads: Sequence[object], rows: Sequence[Sequence[object]]) -> Iterator[str]:
  """Lines of a table. Cells are padded to the width of their column.

  Args:
    heads: of the columns.
    rows: cells, as many as heads.
  """
  clean = lambda cells: [str(cell).replace("|", "/").replace("\n", " ") for cell in cells]
  texts = [clean(heads), *map(clean, rows)]
  widths = [max(3, *map(len, column)) for column in zip(*texts)]
  line = lambda cells: "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths)) + " |"
  yield line(texts[0])
  yield "| " + " | ".join("-" * width for width in widths) + " |"
  yield from map(line, texts[1:])
