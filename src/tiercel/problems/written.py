"""Arithmetic written out: every line follows from the lines before it, one small fact at a time.

    478+65:         8+5=13|3     the column's sum with the carry, then the digits so far
                    7+6+1=14|43
                    4+0+1=5|543
    47*6:           7*6=42|2     a partial product per digit of 86, zeros in place, then their sum
                    4*6=24,+4=28|282
    357/4:          3=0*4+3|0    what is left, divided; then the digits so far
                    35=8*4+3|08

Each function gives (lines, result).
"""

from __future__ import annotations

Lines = list[str]


def digits(n: int) -> list[int]:
    """From the right."""
    return [int(d) for d in reversed(str(n))]


def add(a: int, b: int) -> tuple[Lines, int]:
    if a < 10 and b < 10:
        return [f"{a}+{b}={a + b}"], a + b
    lines, sofar, carry = [f"{a}+{b}:"], "", 0
    A, B = digits(a), digits(b)
    columns = max(len(A), len(B))
    for i in range(columns):
        x, y = (d[i] if i < len(d) else 0 for d in (A, B))
        total = x + y + carry
        sofar = (str(total) if i == columns - 1 else str(total % 10)) + sofar
        lines.append(f"{x}+{y}{'+1' if carry else ''}={total}|{sofar}")
        carry = total // 10
    return lines, a + b


def subtract(a: int, b: int) -> tuple[Lines, int]:
    if b > a:
        lines, result = subtract(b, a)
        return [f"{a}<{b}", *lines, f"-{result}"], -result
    if a < 20 and b < 10:
        return [f"{a}-{b}={a - b}"], a - b
    lines, sofar, borrow = [f"{a}-{b}:"], "", 0
    A, B = digits(a), digits(b)
    for i, x in enumerate(A):
        y = B[i] if i < len(B) else 0
        left = x - y - borrow
        less = "-1" if borrow else ""
        borrow = int(left < 0)
        left += 10 * borrow
        sofar = f"{left}{sofar}"
        lines.append(f"{x}-{y}{less}{'+10' if borrow else ''}={left}|{sofar}")
    return [*lines, f"={a - b}"], a - b


def multiply(a: int, b: int) -> tuple[Lines, int]:
    if len(str(b)) > len(str(a)):
        a, b = b, a
    if a < 10:
        return [f"{a}*{b}={a * b}"], a * b
    lines: Lines = []
    total: int | None = None
    for place, digit in enumerate(digits(b)):
        if digit == 0 and b > 0:
            continue
        lines += _partial(a, digit, place)
        part = a * digit * 10**place
        if total is None:
            total = part
        else:
            more, total = add(total, part)
            lines += more
    return lines, a * b


def _partial(a: int, digit: int, place: int) -> Lines:
    lines, sofar, carry = [f"{a}*{digit}{'0' * place}:"], "0" * place, 0
    A = digits(a)
    for i, x in enumerate(A):
        total = x * digit + carry
        sofar = (str(total) if i == len(A) - 1 else str(total % 10)) + sofar
        lines.append(f"{x}*{digit}={x * digit}{f',+{carry}={total}' if i else ''}|{sofar}")
        carry = total // 10
    return lines


def divide(a: int, b: int) -> tuple[Lines, int, int]:
    """(lines, quotient, remainder)"""
    lines, sofar, left = [f"{a}/{b}:"], "", 0
    for digit in str(a):
        here = left * 10 + int(digit)
        q, left = divmod(here, b)
        sofar += str(q)
        lines.append(f"{here}={q}*{b}+{left}|{sofar}")
    return [*lines, f"={a // b} r{a % b}"], a // b, a % b


def work_out(a: int, sign: str, b: int) -> tuple[Lines, int]:
    """a sign b, sign one of + - * /; a quotient must be whole."""
    if sign == "/":
        if a < 100 and b < 10 and a // b < 10:
            return [f"{a}/{b}={a // b}"], a // b
        lines, quotient, left = divide(a, b)
        assert left == 0
        return lines, quotient
    return {"+": add, "-": subtract, "*": multiply}[sign](a, b)
