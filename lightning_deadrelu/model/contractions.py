"""How products spell in letters: one for each dimension of each operand, and of the result. Pure."""

from __future__ import annotations

import re
import string

from torch import Tensor

from lightning_deadrelu.model.torch_calls import ATTENTIONS, Call

_BATCH = "abcdefgh"


def contraction(call: Call) -> tuple[list[tuple[Tensor, str]], str] | None:
    """Spell a product as ``einsum`` does: a letter for each dimension of each operand, and of the result.

    Of an attention only the values are operands. None where the call is spelt in a way that is not known.

    Example:
        >>> import torch
        >>> x, y = torch.zeros(5, 2, 3), torch.zeros(3, 4)
        >>> terms, result = contraction(Call("matmul", (x, y), {}, [x @ y]))
        >>> [letters for _, letters in terms], result
        (['aik', 'kj'], 'aij')
    """
    if call.name == "einsum":
        return _spelt(call)
    if call.name in ATTENTIONS:
        batch = _BATCH[: call.output.ndim - 2]
        return [(call.argument(2, "value"), batch + "kj")], batch + "ij"
    if call.name == "linear":
        x, weight = call.argument(0, "input"), call.argument(1, "weight")
        batch = _BATCH[: x.ndim - 1]
        return [(x, batch + "k"), (weight, "jk"[-weight.ndim :])], batch + "j" * (weight.ndim - 1)
    factors = call.operands[1:] if call.name in ("addmm", "baddbmm") else call.operands
    if len(factors) != 2:
        return None
    return _matrices(*reversed(factors)) if call.name == "rmatmul" else _matrices(*factors)


def _matrices(left: Tensor, right: Tensor) -> tuple[list[tuple[Tensor, str]], str]:
    """Spell what ``matmul`` does; a vector is a row on the left, and a column on the right."""
    batch = _BATCH[: max(left.ndim, right.ndim, 2) - 2]

    def own(operand: Tensor) -> str:
        return batch[len(batch) - (operand.ndim - 2) :] if operand.ndim > 2 else ""

    terms = [(left, own(left) + "ik"[-left.ndim :]), (right, own(right) + "kj"[: right.ndim])]
    return terms, batch + "i" * (left.ndim > 1) + "j" * (right.ndim > 1)


def _spelt(call: Call) -> tuple[list[tuple[Tensor, str]], str] | None:
    """Write the dots of an equation out, and the letters of its result where they are left out."""
    equation = call.args[0] if call.args else None
    if not isinstance(equation, str):
        return None
    sides = re.sub(r"\s", "", equation).split("->")
    parts, letters = sides[0].split(","), sides[0].replace("...", "")
    once = "".join(sorted(letter for letter in set(letters) - {","} if letters.count(letter) == 1))
    result = sides[1] if len(sides) > 1 else "..." * ("..." in equation) + once
    free = [letter for letter in string.ascii_letters if letter not in equation]
    dots = [operand.ndim - len(part.replace("...", "")) for part, operand in zip(parts, call.operands, strict=True)]

    def whole(part: str, count: int) -> str:
        return part.replace("...", "".join(free[max(dots) - count : max(dots)]))

    terms = [whole(*one) for one in zip(parts, dots, strict=True)]
    width = call.output.ndim - len(result.replace("...", ""))
    return list(zip(call.operands, terms, strict=True)), whole(result, width)
