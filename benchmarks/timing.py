"""Does the time of an answer tell how near a presented key is to a right one?

The secret that is compared is a key's digest. What a caller can vary is the key's text, so each class is a set of
texts: the first or the last byte of the random part wrong, one never issued, one known and inactive; each with the
cache and without. Samples of all classes are interleaved in one run, in an order drawn anew each turn.

A t value is no gate: with a million samples, where a text happens to lie in memory and in a dictionary alone gives
large ones. So the texts are drawn anew for each of `BLOCKS` blocks, and the effect, in nanoseconds, is the mean over
the blocks, held against that of A/A controls: the same class again, with other texts. A deliberate `==` on a long
text must stand out, or this benchmark sees nothing.
"""

from __future__ import annotations

import random
import statistics
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from hmac import compare_digest
from typing import Final

from papaours_auth import Authenticator, KeyFormat, Keys, PepperRing, Refused, open_store
from papaours_auth.format import ALPHABET, base62

from .harness import Result
from .subjects import TRUST, new_peppers

TURNS: Final = 150_000
BLOCKS: Final = 40
TEXTS: Final = 50
SLACK: Final = 10.0
"""Nanoseconds above the largest control: half of what a single bytecode of the interpreter takes."""
LONG: Final = 4_096
SAMPLES: Final = 1_000_000
JUDGED: Final = ("first byte wrong", "last byte wrong", "unknown")
"""Classes that nobody may tell apart: their controls are what effects are held against."""


def run(scale: float = 1.0) -> Result:
    result = Result("timing", "Do refusals take times that tell something?")
    turns = max(50, int(TURNS * scale))
    peppers, store = new_peppers(), open_store("memory://")
    with Keys(store, peppers=peppers) as keys:
        machine = keys.create_machine("Service de facturation", organisation="cfa-lyon")
        valid = [keys.create_key(machine.id, name=f"Banc {n}", environment="prod") for n in range(TEXTS)]
        gone = [keys.create_key(machine.id, name=f"Ancien {n}", environment="prod") for n in range(2 * TEXTS)]
        for new in gone:
            keys.disable_key(new.key.id)
    right = [new.secret.reveal() for new in valid]
    inactive = [new.secret.reveal() for new in gone]
    samples = 0
    for cached, turns_here in ((True, turns), (False, turns // 4)):
        blocks = []
        for _ in range(BLOCKS):
            entries = 10_000 if cached else 1
            with Authenticator(
                store,
                environment="prod",
                peppers=peppers,
                max_staleness=TRUST,
                max_known=entries,
                max_unknown=entries,
            ) as door:
                found = sampled(
                    _refusing(door), drawn(right, inactive, peppers), max(4, turns_here // BLOCKS)
                )
            samples += sum(map(len, found.values()))
            blocks.append({name: middle(times) for name, times in found.items()})
        _judge(result, "cached" if cached else "not cached", blocks)
    detected(result, turns)
    result.add("samples in all", samples, "", goal=SAMPLES if scale >= 1 else None, at_most=False)
    return result


def drawn(right: Sequence[str], inactive: Sequence[str], peppers: PepperRing) -> dict[str, list[bytes]]:
    """Draw the texts of each class anew, in another order each time: what lies where in memory takes part."""
    gone = random.sample(inactive, len(inactive))
    makers: dict[str, Callable[[], list[bytes]]] = {
        "first byte wrong": lambda: [edited(text, 0, peppers) for text in right],
        "last byte wrong": lambda: [edited(text, 23, peppers) for text in right],
        "unknown": lambda: [minted(peppers) for _ in right],
        "inactive": lambda: [gone.pop().encode() for _ in right],
    }
    makers |= {f"{name} (control)": make for name, make in makers.items()}
    return {name: makers[name]() for name in random.sample(list(makers), len(makers))}


def edited(text: str, place: int, peppers: PepperRing) -> bytes:
    """Change one byte of the random part, with tag and checksum made anew: the worst case, an insider's forgery."""
    head, body = text[:-36], text[-36:-12]
    other = random.choice([letter for letter in ALPHABET if letter != body[place]])
    return completed(head + body[:place] + other + body[place + 1 :], peppers)


def completed(tagged: str, peppers: PepperRing) -> bytes:
    checked = tagged + base62(peppers.primary.tag(tagged.encode()), 6)
    return (checked + base62(zlib.crc32(checked.encode()), 6)).encode()


def minted(peppers: PepperRing) -> bytes:
    return KeyFormat().mint("prod", tag=peppers.primary.tag).reveal().encode()


def _refusing(door: Authenticator) -> Callable[[bytes], object]:
    def refuse(text: bytes) -> None:
        try:
            door.authenticate(text)
        except Refused:
            return
        raise RuntimeError("a wrong key came in")

    return refuse


def sampled(
    call: Callable[[bytes], object], texts: Mapping[str, Sequence[bytes]], turns: int
) -> dict[str, list[int]]:
    """Time one call of each class a turn, the order drawn anew."""
    for group in texts.values():
        for text in group:
            call(text)
    found: dict[str, list[int]] = {name: [] for name in texts}
    order = list(texts)
    clock = time.perf_counter_ns
    for turn in range(turns):
        random.shuffle(order)
        for name in order:
            text = texts[name][turn % len(texts[name])]
            begin = clock()
            call(text)
            found[name].append(clock() - begin)
    return found


def middle(values: Sequence[int]) -> float:
    """Give the mean of the middle half: finer than the clock's steps, deaf to interruptions."""
    ordered = sorted(values)
    return statistics.fmean(ordered[len(ordered) // 4 : 3 * len(ordered) // 4 + 1])


def _judge(result: Result, how: str, blocks: Sequence[Mapping[str, float]]) -> None:
    largest = max(abs(effect(blocks, f"{name} (control)", name)[0]) for name in JUDGED)
    result.add(f"{how}: largest A/A control", largest, "ns")
    other = JUDGED[0]
    for name in JUDGED[1:]:
        value, error = effect(blocks, name, other)
        result.add(
            f"{how}: {name} against {other}",
            abs(value),
            "ns",
            goal=largest + SLACK,
            note=f"standard error {error:.1f} ns over {len(blocks)} draws of the texts",
        )
    value, _ = effect(blocks, "inactive", "unknown")
    result.add(
        f"{how}: inactive against unknown",
        value,
        "ns",
        note="the answers differ in text anyway: who holds the right key is told that it is inactive",
    )


def effect(blocks: Sequence[Mapping[str, float]], name: str, other: str) -> tuple[float, float]:
    """Give the mean difference of two classes over the blocks, and its standard error."""
    differences = [block[name] - block[other] for block in blocks]
    return statistics.fmean(differences), statistics.stdev(differences) / len(differences) ** 0.5


def detected(result: Result, turns: int) -> None:
    """Compare long texts by `==`, and by `compare_digest`, with the first or the last byte wrong."""
    right = bytes(LONG)
    classes = {
        "first": [b"x" + right[1:]],
        "first (control)": [b"y" + right[1:]],
        "last": [right[:-1] + b"x"],
    }
    for name, call in (("==", right.__eq__), ("compare_digest", lambda text: compare_digest(right, text))):
        middles = {which: middle(times) for which, times in sampled(call, classes, turns).items()}
        control = abs(middles["first"] - middles["first (control)"])
        effect = abs(middles["last"] - middles["first"])
        result.add(
            f"a deliberate {name} of {LONG} bytes: last against first wrong",
            effect,
            "ns",
            goal=control + SLACK,
            at_most=name != "==",
            note="must be seen" if name == "==" else "",
        )
