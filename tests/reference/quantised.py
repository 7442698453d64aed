"""Block-FP8 and MXFP4 decoded by loops over bytes, from the formats' definitions."""

from __future__ import annotations

import itertools
import math
import struct

import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def e4m3(code: int) -> float:
    """One float8: sign, four bits of exponent with bias 7, three of mantissa; no infinity, NaN is all ones."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return math.nan
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def bfloat16(value: float) -> float:
    """The upper half of a float32, to the nearest, ties to even."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    bits = bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def block_fp8(codes: torch.Tensor, scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[m, n] codes with a scale for every block: the product in float32, then in bfloat16."""
    bytes_, factors = codes.view(torch.uint8), scales.double()
    out = torch.zeros(codes.shape, dtype=torch.float64)
    for i, j in itertools.product(range(codes.shape[0]), range(codes.shape[1])):
        product = e4m3(int(bytes_[i, j])) * float(factors[i // rows, j // columns])
        out[i, j] = bfloat16(product)  # packing rounds to float32 first
    return out.to(torch.bfloat16)


def mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[E, rows, G, 16] and [E, rows, G] -> [E, 32 G, rows]: low nibbles first, scales are exponents with bias 127."""
    experts, rows, groups, _ = blocks.shape
    out = torch.zeros(experts, 32 * groups, rows, dtype=torch.float64)
    for e, r, g in itertools.product(range(experts), range(rows), range(groups)):
        factor = 2.0 ** (int(scales[e, r, g]) - 127)
        for b in range(16):
            byte = int(blocks[e, r, g, b])
            for k, code in enumerate((byte & 15, byte >> 4)):
                value = -E2M1[code & 7] if code & 8 else E2M1[code]
                out[e, 32 * g + 2 * b + k, r] = value * factor
    return out.to(torch.bfloat16)
