"""`hfcompress inspect`: where the bytes of a compressed file go."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hfcompress.checkpoint import Sizes
from hfcompress.coding import Symbols
from hfcompress.coding.trellis import split
from hfcompress.container import Reader


def entropies(reader: Reader) -> dict[str, float]:
    """Tensor → bits a weight that its codes' empirical entropy comes to; tensors without codes are left out.

    A static table cannot code them in fewer; one that looks at what surrounds a code can. Lowest bits that a trellis
    tells do not count.
    """
    values = reader.values()
    found: dict[str, float] = {}
    for stored in reader.slots:
        coded = [value for part in stored.parts.values() if isinstance(value := values[part], Symbols)]
        if coded:
            found[stored.slot.name] = sum(map(_entropy, coded)) / max(stored.slot.numel, 1)
    return found


def _entropy(symbols: Symbols) -> float:
    high = split(symbols.values)
    return symbols.entropy() if high is None else Symbols(high).entropy()


def record(sizes: Sizes, entropy: dict[str, float]) -> dict[str, Any]:
    """Machine-readable: every tensor, the parts around them, the total; bytes, codes in bits, entropy per weight."""
    tensors = [
        {
            "name": t.name,
            "shape": list(t.shape),
            "kind": t.kind,
            "method": t.method,
            "bits_per_weight": t.bits_per_weight,
            "entropy": entropy.get(t.name),
            "code_bits": t.codes,
            "array_bytes": t.arrays,
            "share": (t.codes / 8 + t.arrays) / sizes.total,
        }
        for t in sizes.tensors
    ]
    around = {"stream": sizes.stream, "tables": sizes.tables, "index": sizes.index, "header": sizes.header}
    return {"bytes": sizes.total, "bits_per_weight": sizes.bits_per_weight, **around, "tensors": tensors}


def print_sizes(sizes: Sizes, entropy: dict[str, float], console: Console) -> None:
    """One line a tensor, then what lies around them; the lines add up to the file."""
    table = Table(box=None, pad_edge=False)
    table.add_column("tensor", overflow="fold")
    for heading in ("shape", "kind", "method"):
        table.add_column(heading, no_wrap=True)
    for heading in ("bits/weight", "entropy", "bytes", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    for t in sizes.tensors:
        size = t.codes / 8 + t.arrays
        shape = "×".join(map(str, t.shape)) or "scalar"
        share = f"{100 * size / sizes.total:.1f} %"
        bits = f"{entropy[t.name]:.3f}" if t.name in entropy else ""
        table.add_row(escape(t.name), shape, t.kind, t.method, f"{t.bits_per_weight:.3f}", bits, f"{size:,.0f}", share)
    for name, size in (("frequency tables", sizes.tables), ("index", sizes.index), ("header", sizes.header)):
        table.add_row(name, "", "", "", "", "", f"{size:,}", f"{100 * size / sizes.total:.1f} %", style="dim")
    whole = (f"{sizes.weights:,} values", "", "", f"{sizes.bits_per_weight:.3f}", "", f"{sizes.total:,}")
    table.add_row("file", *whole, "", style="bold")
    console.print(table)
