"""What a model can do with far text: bits of bytes that repeat earlier ones, copied passages, names that were defined."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The bytes before a byte that have to occur earlier for it to be a repetition.
GRAM = 12
DISTANCES = (512, 2048, 4096, 8192, 32768)
_PASSAGE = 256
_COPIED = tuple(distance - _PASSAGE for distance in DISTANCES)

Bits = Callable[[np.ndarray], np.ndarray]


def bits_of(model: nn.Module, tokens: np.ndarray, device: torch.device, batch: int) -> np.ndarray:
    """(windows, N) float32 bits of every byte but the first of windows (windows, N + 1)."""
    parts = []
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        for rows in torch.from_numpy(tokens.astype(np.int64)).split(batch):
            # Always whole batches: another size would be compiled anew.
            padded = F.pad(rows, (0, 0, 0, batch - len(rows))).to(device)
            logits: Tensor = model(padded[:, :-1])
            nats = F.cross_entropy(logits.flatten(0, 1), padded[:, 1:].flatten(), reduction="none")
            parts.append((nats.view(batch, -1)[: len(rows)] / np.log(2)).float().cpu().numpy())
    return np.concatenate(parts)


def repeat_distance(window: np.ndarray) -> np.ndarray:
    """For each byte but the first: the distance to the last place where the same GRAM bytes stood before the same byte; or 0."""
    text = window.tobytes()
    last: dict[bytes, int] = {}
    distance = np.zeros(len(window) - 1, dtype=np.int64)
    for at in range(GRAM, len(text)):
        gram = text[at - GRAM : at]
        if (before := last.get(gram)) is not None and text[before] == text[at]:
            distance[at - 1] = at - before
        last[gram] = at
    return distance


def repeated(bits: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """Mean bits of repeated bytes by the distance of the last repetition, and of all others."""
    distance = np.stack([repeat_distance(window) for window in tokens])
    found, nearer = {}, 0
    for limit in DISTANCES:
        inside = (distance > nearer) & (distance <= limit)
        if inside.any():
            found[f"up to {limit}"] = float(bits[inside].mean())
        nearer = limit
    found["not repeated"] = float(bits[distance == 0].mean())
    return found


def copied(
    bits: Bits, text: np.ndarray, length: int, distances: tuple[int, ...], count: int, seed: int
) -> dict[str, float]:
    """Mean bits of the last seven eighths of a passage of 256 bytes that stands at the end and ``distance`` before it."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    starts = generator.integers(0, len(text) - length, (count, 2))
    found = {}
    for distance in distances:
        if distance + _PASSAGE >= length:
            continue
        windows = np.stack([text[start : start + length + 1].copy() for start, _ in starts])
        for window, (_, other) in zip(windows, starts, strict=True):
            passage = text[other : other + _PASSAGE]
            window[-_PASSAGE:] = passage
            window[-_PASSAGE - distance : len(window) - distance] = passage
        found[str(distance)] = float(bits(windows)[:, -7 * _PASSAGE // 8 :].mean())
    return found


def named(
    bits: Bits, text: np.ndarray, length: int, distances: tuple[int, ...], count: int, seed: int
) -> dict[str, float]:
    """Mean bits of the second half of a made-up name at the end, which a line of code ``distance`` before it defines."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", dtype=np.uint8)
    starts = generator.integers(0, len(text) - length, count)
    names = letters[generator.integers(0, 26, (count, 16))]
    found = {}
    for distance in distances:
        if distance + 64 >= length:
            continue
        windows = np.stack([text[start : start + length + 1].copy() for start in starts])
        for window, name in zip(windows, names, strict=True):
            first = np.frombuffer(b"\ndef load_" + name.tobytes() + b"(path):\n", dtype=np.uint8)
            again = np.frombuffer(b"\n    return load_" + name.tobytes(), dtype=np.uint8)
            at = len(window) - distance - len(again)
            window[at : at + len(first)] = first
            window[-len(again) :] = again
        found[str(distance)] = float(bits(windows)[:, -8:].mean())
    return found


def by_position(bits: np.ndarray, edges: tuple[int, ...]) -> dict[str, float]:
    """Mean bits between positions of the context."""
    return {
        f"{start} to {stop}": float(bits[:, start:stop].mean())
        for start, stop in pairwise(edges)
        if start < bits.shape[1]
    }


def by_place_in_segment(bits: np.ndarray, segment: int = 512, parts: int = 8) -> list[float]:
    """Mean bits by position modulo a segment, in equal parts; the first segment is left out."""
    place = np.arange(bits.shape[1]) % segment * parts // segment
    later = np.arange(bits.shape[1]) >= segment
    return [float(bits[:, (place == part) & later].mean()) for part in range(parts)] if later.any() else []


def all_probes(
    bits: Bits,
    text: np.ndarray,
    windows: np.ndarray,
    length: int,
    distances: tuple[int, ...] = _COPIED,
    passages: int = 32,
) -> dict[str, object]:
    """Every probe of one model.

    Args:
        distances, passages: how far back a copied passage and a name stand, and how many there are of each.
    """
    edges = (0, 256, *(2**power for power in range(10, 18)))
    scored = bits(windows)
    probes: Mapping[str, Callable[..., dict[str, float]]] = {"copied": copied, "named": named}
    return {
        "bits": float(scored.mean()),
        "late_bits": float(scored[:, length // 2 :].mean()),
        "by_window": [round(float(one), 5) for one in scored.mean(1)],
        "late_by_window": [round(float(one), 5) for one in scored[:, length // 2 :].mean(1)],
        "by_position": by_position(scored, edges),
        "by_place_in_segment": by_place_in_segment(scored),
        "repeated": repeated(scored, windows),
        **{name: probe(bits, text, length, distances, passages, 5) for name, probe in probes.items()},
    }
