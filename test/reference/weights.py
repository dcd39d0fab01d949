"""The numbers of every reference: weights, inputs and LoRA matrices, made from their names.

The same generator exists in TypeScript (test/fixtures/weights.ts) and agrees with this one bit for bit, so fixtures
hold outputs only. Knows no model and no file format.

    h    = FNV-1a (32 bits) of the UTF-8 bytes of the name
    u    = (i * 0x9E3779B1) ^ h;  u ^= u >> 16;  u *= 0x85EBCA6B;  u ^= u >> 13;  u *= 0xC2B2AE35   (mod 2^32)
    k(i) = (((u >> 16) * (2R + 1)) >> 16) - R                       an integer in [-R, R]
    value(i) = k(i) * 2^-s                                          (norm weights: (128 + k(i)) / 128, R = 32)

R and s come from a bound B (values are uniform in [-B, B], variance B^2 / 3): s is the largest shift up to 14 with
B * 2^s < 127.5, and R = floor(B * 2^s + 0.5). So every value has at most 8 significant bits and a magnitude of 0 or
at least 2^-14: exact in f32, f16 (never subnormal) and bf16 alike. The bound, first rule that fits, where fan is the
product of all dimensions but the first:

    @...                         inputs                                 sqrt(3)
    #... up matrices             (lora_up, lora_B, lora.up)             LORA_GAIN * sqrt(3 / fan)
    #... other LoRA matrices     (down, mid)                            sqrt(3 / fan)
    one dimension, .weight       norm weights                           (see above)
    one dimension                biases                                 0.1
    else                         matrices                               gain(name) * sqrt(3 / fan)
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

#: Std of a LoRA's contribution relative to its input, before alpha / rank and strength.
LORA_GAIN = 0.1
UP_SUFFIXES = (".lora_up.weight", ".lora_B.weight", "lora.up.weight")

#: Suffix -> gain. SiLU and GEGLU lose variance, which 1.6 restores; logits get a std of 1.7; what is added to a
#: residual stream stays below it, so that rounding errors do not grow from block to block.
GAINS: tuple[tuple[str, float], ...] = (
    (".to_q.weight", 1.3),
    (".to_k.weight", 1.3),
    (".to_out.0.weight", 0.7),
    (".ff.net.2.weight", 1.0),
    (".proj_out.weight", 0.7),
    (".in_layers.2.weight", 1.6),
    (".out_layers.3.weight", 0.8),
    ("out.2.weight", 1.6),
    ("time_embed.0.weight", 1.4),
    ("time_embed.2.weight", 1.6),
    ("label_emb.0.2.weight", 1.6),
)

CHUNK = 1 << 16
_STEPS = np.arange(CHUNK, dtype=np.uint32) * np.uint32(0x9E3779B1)


def fnv1a(name: str) -> int:
    """FNV-1a, 32 bits, over the UTF-8 bytes."""
    value = 0x811C9DC5
    for byte in name.encode():
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
    return value


def _bound(name: str, shape: tuple[int, ...]) -> float:
    fan = math.prod(shape[1:])
    if name.startswith("@"):
        return math.sqrt(3)
    if name.startswith("#"):
        return (LORA_GAIN if name.endswith(UP_SUFFIXES) else 1.0) * math.sqrt(3 / fan)
    if len(shape) == 1:
        return 0.1
    gain = next((gain for suffix, gain in GAINS if name.endswith(suffix)), 1.0)
    return gain * math.sqrt(3 / fan)


def quantisation(name: str, shape: tuple[int, ...]) -> tuple[int, float, float]:
    """R, the unit 2^-s, and the offset added after scaling."""
    if len(shape) == 1 and name[0] not in "@#" and name.endswith(".weight"):
        return 32, 1 / 128, 1.0
    bound = _bound(name, shape)
    shift = 0
    while shift < 14 and bound * 2.0 ** (shift + 1) < 127.5:
        shift += 1
    return math.floor(bound * 2.0**shift + 0.5), 2.0**-shift, 0.0


def generate(name: str, shape: tuple[int, ...]) -> Floats:
    """The tensor `name` in f32, C order."""
    limit, unit, offset = quantisation(name, shape)
    count = math.prod(shape)
    out = np.empty(count, dtype=np.float32)
    seed = np.uint32(fnv1a(name))
    work = np.empty(CHUNK, dtype=np.uint32)
    temp = np.empty(CHUNK, dtype=np.uint32)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        u, t, view = work[:size], temp[:size], out[start : start + size]
        np.add(_STEPS[:size], np.uint32((start * 0x9E3779B1) & 0xFFFFFFFF), out=u)
        np.bitwise_xor(u, seed, out=u)
        np.right_shift(u, 16, out=t)
        np.bitwise_xor(u, t, out=u)
        np.multiply(u, np.uint32(0x85EBCA6B), out=u)
        np.right_shift(u, 13, out=t)
        np.bitwise_xor(u, t, out=u)
        np.multiply(u, np.uint32(0xC2B2AE35), out=u)
        np.right_shift(u, 16, out=u)
        np.multiply(u, np.uint32(2 * limit + 1), out=u)
        np.right_shift(u, 16, out=u)
        view[:] = u
        view -= limit
        view *= np.float32(unit)
        if offset:
            view += np.float32(offset)
    return out.reshape(shape)
