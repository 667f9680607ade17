"""`hfcompress inspect`: where the bytes of a compressed file go."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hfcompress.checkpoint import Sizes


def record(sizes: Sizes) -> dict[str, Any]:
    """Machine-readable: every tensor, the parts around them, the total; bytes, codes in bits."""
    tensors = [
        {
            "name": t.name,
            "shape": list(t.shape),
            "kind": t.kind,
            "method": t.method,
            "bits_per_weight": t.bits_per_weight,
            "code_bits": t.codes,
            "array_bytes": t.arrays,
        }
        for t in sizes.tensors
    ]
    around = {"stream": sizes.stream, "tables": sizes.tables, "index": sizes.index, "header": sizes.header}
    return {"bytes": sizes.total, "bits_per_weight": sizes.bits_per_weight, **around, "tensors": tensors}


def print_sizes(sizes: Sizes, console: Console) -> None:
    """One line a tensor, then what lies around them; the lines add up to the file."""
    table = Table(box=None, pad_edge=False)
    table.add_column("tensor", overflow="fold")
    for heading in ("shape", "kind", "method"):
        table.add_column(heading, no_wrap=True)
    for heading in ("bits/weight", "bytes", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    for t in sizes.tensors:
        size = t.codes / 8 + t.arrays
        shape = "×".join(map(str, t.shape)) or "scalar"
        share = f"{100 * size / sizes.total:.1f} %"
        table.add_row(escape(t.name), shape, t.kind, t.method, f"{t.bits_per_weight:.3f}", f"{size:,.0f}", share)
    for name, size in (("frequency tables", sizes.tables), ("index", sizes.index), ("header", sizes.header)):
        table.add_row(name, "", "", "", "", f"{size:,}", f"{100 * size / sizes.total:.1f} %", style="dim")
    total = f"{sizes.total:,}"
    table.add_row("file", f"{sizes.weights:,} values", "", "", f"{sizes.bits_per_weight:.3f}", total, "", style="bold")
    console.print(table)
