"""`hfcompress compress`: reads, compresses, writes, checks, and says in a table what it has done."""

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hfcompress.compress import GRID, Outcome, compress
from hfcompress.compress_rules import default_rules, method_called, rules_in
from hfcompress.originals import load_original
from hfcompress.plain_card import write_plain_card
from hfcompress.progress import bar, quiet_libraries
from hfcompress.results import readable_bytes
from hfcompress.verify import verify

_MUCH = 0.6  # of the norm: at 1 bit the grid changes less, and few models do anything sensible then
_STEPS = 6  # load, code (three times, as a rule), write, check


def run(
    name: str,
    output: Path,
    bits: float | None,
    target_bytes: int | None,
    method: str | None,
    rules_file: Path | None,
    revision: str | None,
    command: str,
    out: Console,
    errors: Console,
) -> None:
    """What the options say, with a bar on `errors` and the table on `out`. Raises what reading and compressing do."""
    quiet_libraries()
    rules = None if rules_file is None else rules_in(rules_file)
    asked = (method or GRID).lower()
    chosen = None if asked == GRID else method_called(asked, bits)
    with bar(errors) as progress:
        task = progress.add_task("compress", total=_STEPS, note=f"loading {name}")

        def say(what: str) -> None:
            progress.update(task, advance=1, note=what)

        original = load_original(name, revision)
        if chosen is not None:
            rules = default_rules(original.model, chosen)
        outcome = compress(original, output, bits=bits, target_bytes=target_bytes, rules=rules, say=say)
        write_plain_card(output, original, outcome, command)
        say("checking")
        for _ in verify(output):
            pass
        progress.update(task, completed=_STEPS, total=_STEPS, note="")
    print_outcome(outcome, out)


def print_outcome(outcome: Outcome, console: Console) -> None:
    """A line for each kind of weight, and one for the whole file."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("weights", no_wrap=True)
    for heading in ("values", "bytes before", "bytes", "bits/weight", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for group in outcome.groups:
        bits = error = ""
        if group.weights:
            bits, error = f"{group.bits_per_weight:.3f}", f"{100 * group.relative_error:.2f} %"
        values = f"{group.weights:,}" if group.weights else ""
        table.add_row(group.name, values, f"{group.before:,}", f"{group.after:,.0f}", bits, error)
    sizes = outcome.sizes
    whole = (f"{sizes.weights:,}", f"{outcome.before:,}", f"{sizes.total:,}", f"{sizes.bits_per_weight:.3f}")
    table.add_row("file", *whole, f"{100 * outcome.relative_error:.2f} %", style="bold")
    console.print(table)
    times = f"{outcome.before / sizes.total:.1f} × smaller"
    console.print(f"{readable_bytes(outcome.before)} → {readable_bytes(sizes.total)}, {times}", highlight=False)
    if outcome.relative_error > _MUCH:
        console.print(
            f"the weights differ from the original's by {100 * outcome.relative_error:.0f} % of their norm: little is "
            "left of what the model could do. Give more bits, or a method that does not need training",
            style="yellow",
        )
