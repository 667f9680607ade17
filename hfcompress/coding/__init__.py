"""Integers ⇄ bytes.

    arrays ──▶ plan: for each the shortest form ──▶ frequency tables (bits) + one interleaved rANS stream (16-bit words)

`tables` frequency tables; `pool` who shares one; `contexts` classes of symbols by their neighbours, `classes` their
tables; `rans` the coder; `plan` the choice and the order of the stream; `decoder` the way back.
"""

from hfcompress.coding.symbols import Symbols

__all__ = ["Symbols"]
