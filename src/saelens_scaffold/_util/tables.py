"""Tables in Markdown, for the terminal and for model cards."""

from rich.console import Console
from rich.table import Table


def markdown(table: Table) -> str:
    """A table as lines of Markdown, each as wide as it needs."""
    # as wide as the table, also where the output goes into a file
    console = Console(width=10_000, highlight=False)
    with console.capture() as capture:
        console.print(table)
    lines = (line.rstrip() for line in capture.get().splitlines())
    return "\n".join(line for line in lines if line) + "\n"
