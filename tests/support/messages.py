"""Small valid messages for tests."""

from __future__ import annotations

from wire.messages import Beat, BlobRef, Caps, Order, Presence, Recipe, Refusal, Reply, Usage
from wire.spec import Structure

RUN = "1" * 16
CAPS = Caps("0.1.0", ("torch",), 64 << 20, 1, 100, 10, (1, 8, 8))


def order_id(device: str, number: int) -> str:
    return f"{number:08x}{int(device.lstrip('d')):08x}"


def an_order(device: str, number: int, *, bytes_peak: int = 1000) -> Order:
    blob = BlobRef("b" * 64, 1000)
    structure = Structure(1, {"h1": (3, 6, 9)}, "a" * 64)
    return Order(
        id=order_id(device, number),
        run=RUN,
        round=number,
        device=device,
        verb="train",
        spec=blob,
        shells=(blob, BlobRef("c" * 64, 2000)),
        structures=(structure,),
        recipe=Recipe(),
        bytes_peak=bytes_peak,
        seconds=60.0,
    )


def a_reply(device: str, order: str, *, boot: str = "0" * 16, bytes_peak: int = 1000, samples: int = 100) -> Reply:
    return Reply(
        order=order,
        device=device,
        boot=boot,
        structure=Structure(1, {"h1": (3, 6, 9)}, "a" * 64),
        update=BlobRef("d" * 64, 5000),
        keep="",
        samples=samples,
        metrics={"loss": 1.5, "accuracy.after": 0.5},
        usage=Usage(bytes_base=1, bytes_peak=bytes_peak, bytes_budget=2000, seconds=3.0, micro_batch=8, engine="torch"),
    )


def a_refusal(device: str, order: str, *, boot: str = "0" * 16, reason: str = "memory") -> Refusal:
    return Refusal(order, device, boot, reason, "does not fit", 3000, 2000)  # type: ignore[arg-type]  # a Literal


def a_presence(device: str, seq: int, state: str = "online") -> Presence:
    caps = CAPS if state == "online" else None
    return Presence(device, state, f"{seq:016x}", seq, caps)  # type: ignore[arg-type]  # a Literal


def a_beat(seq: int, *, order: str = "", done: float = 0.0, bytes_peak: int = 0) -> Beat:
    return Beat(f"{seq:016x}", seq, order, done, bytes_peak)
