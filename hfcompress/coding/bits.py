"""Small integers in few bits: the side information of the coder and of the file's index."""

from hfcompress.errors import FormatError


class BitWriter:
    """Bits, most significant first; `to_bytes` fills the last byte with zeros."""

    def __init__(self) -> None:
        self._digits: list[str] = []

    def fixed(self, value: int, width: int) -> None:
        if width:
            self._digits.append(format(value, f"0{width}b"))

    def golomb(self, value: int, order: int = 0) -> None:
        """Exponential Golomb code of a value ≥ 0: as many zeros as there are further bits, then value + 2^order."""
        shifted = value + (1 << order)
        self._digits.append("0" * (shifted.bit_length() - 1 - order) + format(shifted, "b"))

    def signed(self, value: int, order: int = 0) -> None:
        self.golomb(zigzag(value), order)

    def append(self, other: "BitWriter") -> None:
        self._digits += other._digits

    def __len__(self) -> int:
        return sum(map(len, self._digits))

    def to_bytes(self) -> bytes:
        digits = "".join(self._digits)
        digits += "0" * (-len(digits) % 8)
        return int(digits, 2).to_bytes(len(digits) // 8, "big") if digits else b""


class BitReader:
    """The inverse. Raises FormatError: truncated, or a code longer than any writer makes."""

    def __init__(self, data: bytes) -> None:
        self._digits = format(int.from_bytes(data, "big"), f"0{8 * len(data)}b") if data else ""
        self._at = 0

    def fixed(self, width: int) -> int:
        start, self._at = self._at, self._at + width
        if self._at > len(self._digits):
            raise FormatError("the frequency tables are truncated")
        return int(self._digits[start : self._at], 2) if width else 0

    def golomb(self, order: int = 0) -> int:
        one = self._digits.find("1", self._at, self._at + 64)
        if one < 0:
            raise FormatError("the frequency tables are truncated or malformed")
        zeros, self._at = one - self._at, one
        return self.fixed(zeros + 1 + order) - (1 << order)

    def signed(self, order: int = 0) -> int:
        return unzigzag(self.golomb(order))

    def finish(self) -> None:
        """Raises FormatError unless less than a byte is left, and that zero."""
        rest = self._digits[self._at :]
        if len(rest) > 7 or "1" in rest:
            raise FormatError("the frequency tables hold more than is used")


def zigzag(value: int) -> int:
    """0, −1, 1, −2 … → 0, 1, 2, 3 …"""
    return value * 2 if value >= 0 else -value * 2 - 1


def unzigzag(value: int) -> int:
    return value // 2 if value % 2 == 0 else -(value + 1) // 2
