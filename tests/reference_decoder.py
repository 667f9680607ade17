"""A second reader of format 1, written from docs/format.md with plain loops: the promise that files stay readable.

It imports nothing of the package. `parts(data)` gives each part of a file, `tensors(data)` its weights and raw tensors;
how the parts of each method become weights is in reference_methods.py.
"""

import hashlib
import json
import lzma
import re
import zlib
from math import prod
from typing import Any

import numpy as np
import reference_methods

TYPES = ("symbols", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
SIZES = (0, 8, 4, 2, 2, 8, 4, 2, 1, 1, 1)
NUMPY = {"bfloat16": "int16", "bool": "uint8"}
LZMA = [{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 20, "lc": 3, "lp": 0, "pb": 0}]


class Numbers:
    """LEB128 numbers and runs of bytes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self) -> int:
        value = shift = 0
        while True:
            byte, self.at = self.data[self.at], self.at + 1
            value += (byte % 128) << shift
            shift += 7
            if byte < 128:
                return value

    def signed(self) -> int:
        return unzigzag(self.number())

    def take(self, n: int) -> bytes:
        self.at += n
        return self.data[self.at - n : self.at]

    def column(self, n: int) -> list[int]:
        return [self.number() for _ in range(n)]


class Bits:
    def __init__(self, data: bytes) -> None:
        self.bits, self.at = "".join(f"{byte:08b}" for byte in data), 0

    def fixed(self, n: int) -> int:
        self.at += n
        return int("0" + self.bits[self.at - n : self.at], 2)

    def golomb(self, order: int = 0) -> int:
        zeros = 0
        while self.fixed(1) == 0:
            zeros += 1
        return (1 << zeros + order) + self.fixed(zeros + order) - (1 << order)

    def signed(self, order: int = 0) -> int:
        return unzigzag(self.golomb(order))


def unzigzag(n: int) -> int:
    return n // 2 if n % 2 == 0 else -(n + 1) // 2


def read_index(packed: bytes, dictionary: bytes) -> dict[str, Any]:
    data = packed[1:]
    if packed[0] == 1:
        data = zlib.decompressobj(-15, dictionary).decompress(data)
    elif packed[0] == 2:
        data = lzma.decompress(data, lzma.FORMAT_RAW, filters=LZMA)
    source = Numbers(data)
    length, n_slots, n_raw, log_states = source.column(4)
    tool, methods, layouts, _ = json.loads(source.take(length))
    names = read_names(source, n_slots + n_raw)
    shapes = [source.column(axes) for axes in source.column(n_slots + n_raw)]
    source.column(n_slots + n_raw)  # kinds
    dtypes, of_method, of_layout = source.column(n_slots), source.column(n_slots), source.column(n_slots)
    places = read_places(source, of_method, [prod(shape) for shape in shapes[:n_slots]])
    raw_types = source.column(n_raw)
    parts, mentions = [], []
    for i, shape in enumerate(shapes):
        types = [kind for _, kind in layouts[of_layout[i]]] if i < n_slots else [TYPES[raw_types[i - n_slots]]]
        mentions.append([])
        for kind in types:
            back = source.number()
            mentions[-1].append(len(parts) - back)
            if back == 0:
                parts.append({"type": kind, "count": read_count(source, prod(shape)), "shape": shape})
    for part in parts:
        part["tables"] = [n - 2 for n in source.column(SIZES[TYPES.index(part["type"])] or 1)]
    for part in parts:
        part["joined"], part["shift"] = divmod(source.number() if part["type"] == "symbols" else 0, 14)
    for part in parts:
        part["center"], part["prior"] = (source.signed(), source.number()) if part["tables"] == [-1] else (0, 0)
    slots = [
        (
            names[i],
            shapes[i],
            TYPES[dtypes[i]],
            methods[of_method[i]],
            [n for n, _ in layouts[of_layout[i]]],
            mentions[i],
            places[i],
        )
        for i in range(n_slots)
    ]
    raw = [(names[i], shapes[i], mentions[i][0]) for i in range(n_slots, n_slots + n_raw)]
    return {"tool": tool, "states": 1 << log_states, "parts": parts, "slots": slots, "raw": raw}


def read_places(source: Numbers, of_method: list[int], counts: list[int]) -> list[tuple[int, int]]:
    """Each slot's offset in its group, and how many weights the group has."""
    places: list[tuple[int, int]] = []
    expected = {m: (0, sum(n for n, own in zip(counts, of_method) if own == m)) for m in of_method}
    for method, count in zip(of_method, counts):
        offset, total = (of + source.signed() for of in expected[method])
        places.append((offset, total))
        expected[method] = offset + count, total
    return places


def read_count(source: Numbers, weights: int) -> int:
    number = source.number()
    return number - 1 if number else weights


def read_names(source: Numbers, count: int) -> list[str]:
    """Byte 1 stands for the number that the name before has at this place, byte 2 for the next one."""
    names, before = [], []
    for _ in range(count):
        end = source.data.index(b"\0", source.at)
        name, numbers = "", []
        for piece in re.findall("[0-9]+|\1|\2|[^0-9\1\2]+", source.take(end - source.at).decode()):
            if piece in ("\1", "\2"):
                piece = str(int(before[len(numbers)]) + 1) if piece == "\2" else before[len(numbers)]
            if piece.isdecimal():
                numbers.append(piece)
            name += piece
        source.at += 1
        names.append(name)
        before = numbers
    return names


def read_table(bits: Bits) -> tuple[int, list[int]]:
    first, k = bits.signed(2), bits.golomb(3) + 1
    if k == 1:
        return first, [1 << 14]
    fineness, length, values = bits.fixed(3), 0, []
    for _ in range(k):
        length += bits.signed()
        if length == 0:
            values.append(0)
            continue
        kept = max(length - fineness, 0) // 2
        dropped = length - 1 - kept
        values.append(((1 << kept) + bits.fixed(kept) << dropped) + (1 << dropped) // 2)
    used, total = sum(v > 0 for v in values), sum(values)
    frequencies = [1 + v * ((1 << 14) - used) // total if v else 0 for v in values]
    frequencies[frequencies.index(max(frequencies))] += (1 << 14) - sum(frequencies)
    return first, frequencies


def read_classes(bits: Bits) -> list[list[Any]]:
    """For each of 64 scales its four tables."""
    rows, ends = bits.golomb(3) + 1, []
    for _ in range(rows - 1):
        ends.append((ends[-1] if ends else 0) + bits.golomb() + 1)
    tables = [[read_table(bits) if bits.fixed(1) else None for _ in range(4)] for _ in range(rows)]
    return [tables[sum(end <= scale for end in ends)] for scale in range(64)]


class Stream:
    def __init__(self, words: list[int], states: int) -> None:
        self.x = [words[2 * i] * 65536 + words[2 * i + 1] for i in range(states)]
        self.words, self.at, self.turn = words, 2 * states, 0

    def symbol(self, table: tuple[int, list[int]]) -> int:
        first, frequencies = table
        if len(frequencies) == 1:
            self.turn += 1
            return first
        x = self.x[self.turn % len(self.x)]
        place, number = x % 16384, 0
        while place >= frequencies[number]:
            place -= frequencies[number]
            number += 1
        x = frequencies[number] * (x // 16384) + place
        if x < 65536:
            x = x * 65536 + self.words[self.at]
            self.at += 1
        self.x[self.turn % len(self.x)] = x
        self.turn += 1
        return first + number


def log(v: int) -> int:
    """⌊8 log2(v + 1)⌋ of v, at most 65,535."""
    return ((min(v, 65535) + 1) ** 8).bit_length() - 1


def read_contexts(parts: list[dict[str, Any]], groups: list[Any], stream: Stream) -> None:
    """The high numbers of all parts coded by contexts, in step."""
    for p in parts:
        shape = p["shape"]
        p["rows"], p["channels"], p["places"] = shape[0], shape[1], prod(shape[2:])
        p["line"] = shape[-1] if len(shape) > 2 else 1
        p["mean"] = ((8 + p["prior"] % 8) << p["prior"] // 8) // 8
        p["wide"] = p["channels"] * p["places"]
        p["high"], p["row_sums"], p["channel_sums"] = [0] * p["count"], [0] * p["rows"], [0] * p["channels"]
        p["lanes"] = -(-p["rows"] // 8)
    for t in range(max(min(8, p["rows"]) * p["wide"] for p in parts)):
        for p in parts:
            found = []
            for lane in range(p["lanes"]):
                row, c = 8 * lane + t // p["wide"], t % p["wide"]
                if t // p["wide"] < 8 and row < p["rows"]:
                    found.append((row, c, read_one(p, row, c, t, groups, stream)))
            for row, c, symbol in found:
                p["high"][row * p["wide"] + c] = symbol
                p["row_sums"][row] += abs(symbol)
                p["channel_sums"][c // p["places"]] += abs(symbol)


def read_one(p: dict[str, Any], row: int, c: int, t: int, groups: list[Any], stream: Stream) -> int:
    places, line, mean, at = p["places"], p["line"], p["mean"], row * p["wide"] + c
    channel, place = c // places, c % places
    seen = p["lanes"] * (t // p["wide"] * places + place)
    left = p["high"][at - 1] if place % line > 0 else None
    above = p["high"][at - line] if place >= line else None
    between = p["high"][at - line - 1] if place % line > 0 and place >= line else 0
    near = sum(256 * abs(n) if n is not None else mean for n in (left, above)) + mean
    of_row = (256 * p["row_sums"][row] + 4 * mean) // (c + 4)
    of_channel = (256 * p["channel_sums"][channel] + 4 * mean) // (seen + 4)
    w_row, w_channel, w_near = (12, 12, 6) if places > 1 else (8, 12, 0)
    scale = w_row * log(of_row) + w_channel * log(of_channel) + w_near * log(near // 3)
    scale += (16 - w_row - w_channel - w_near) * log(mean)
    scale = min(max(scale // 16, 0), 127)
    lean = 5 * (left or 0) + 4 * (above or 0) - between
    size = sum(log(20 * abs(lean)) - scale >= step for step in (-25, -13, -5)) if lean else 0
    symbol = stream.symbol(groups[places == 1][scale // 2][size])
    return -symbol if lean < 0 else symbol


def parts(data: bytes, dictionary: bytes) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The index and the values of every part. dictionary: the one that docs/format.md gives for deflate."""
    length = int.from_bytes(data[:8], "little")
    assert list(json.loads(data[8 : 8 + length])) == ["hfcompress-1"]
    digest, payload = data[8 + length : 40 + length], data[40 + length :]
    assert hashlib.sha256(payload).digest() == digest
    source = Numbers(payload)
    lengths = source.column(3)
    packed, tables, rest = (source.take(n) for n in lengths)
    index = read_index(packed, dictionary)
    bits = Bits(tables)
    shared = [read_table(bits) for _ in range(bits.golomb())]
    groups = [read_classes(bits) if bits.fixed(1) else None for _ in range(2)]
    words = np.frombuffer(payload[source.at :], dtype="<u2").tolist()
    stream = Stream(words, index["states"])

    planes: dict[tuple[int, int], list[int]] = {}
    for number, table in enumerate(shared):
        for i, part in enumerate(index["parts"]):
            for j, taken in enumerate(part["tables"]):
                if part["type"] != "symbols" and taken == number:
                    planes[i, j] = read_run(stream, table, part["count"])
    walked = [p for p in index["parts"] if p["tables"] == [-1]]
    if walked:
        read_contexts(walked, groups, stream)
        for part in walked:
            part["values"] = read_low(stream, part, part["high"])
    for part in index["parts"]:
        if part["type"] == "symbols" and part["tables"][0] >= 0:
            part["values"] = read_low(stream, part, read_run(stream, shared[part["tables"][0]], part["count"]))
    assert stream.at == len(words) and all(x // 65536 == 1 for x in stream.x)
    rest += b"".join((x % 65536).to_bytes(2, "little") for x in stream.x)
    values, at = [], 0
    for i, part in enumerate(index["parts"]):
        if part["type"] == "symbols":
            values.append(np.array(part.get("values", []), dtype=np.int32))
            continue
        octets = np.zeros((part["count"], len(part["tables"])), dtype=np.uint8)
        plain = [j for j in range(len(part["tables"])) if (i, j) not in planes]
        for k in range(part["count"]):
            for j in plain:
                octets[k, j], at = rest[at], at + 1
        for j in range(len(part["tables"])):
            if (i, j) in planes:
                octets[:, j] = planes[i, j]
        values.append(octets.reshape(-1).view(NUMPY.get(part["type"], part["type"])))
    return index, values


def read_run(stream: Stream, table: tuple[int, list[int]], count: int) -> list[int]:
    if len(table[1]) == 1:
        return [table[0]] * count  # not in the stream
    return [stream.symbol(table) for _ in range(count)]


def read_low(stream: Stream, part: dict[str, Any], high: list[int]) -> list[int]:
    shift = part["shift"]
    even = (0, [16384 >> shift] * (1 << shift))
    low = [stream.symbol(even) for _ in high] if shift else [0] * len(high)
    whole = [(h << shift) + b + part["center"] for h, b in zip(high, low)]
    return join(whole) if part["joined"] else whole


def join(high: list[int]) -> list[int]:
    lowest: list[int] = []
    for t, h in enumerate(high):
        if t % 1008 == 0:
            one = two = three = before = 0
        one, two, three = two ^ three ^ (before % 2), one, two
        lowest.append(one)
        before = h
    return [2 * h + q for h, q in zip(high, lowest)]


def tensors(data: bytes, dictionary: bytes) -> dict[str, np.ndarray]:
    """All tensors; those of bfloat16 and bool as their bits."""
    index, values = parts(data, dictionary)
    found = {name: values[part].reshape(shape) for name, shape, part in index["raw"]}
    for name, shape, dtype, method, names, numbers, place in index["slots"]:
        given = dict(zip(names, (values[n] for n in numbers)))
        found[name] = reference_methods.weight(shape, dtype, method, given, *place)
    return found
