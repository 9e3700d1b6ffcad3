"""Everything that is said between a coordinator and its devices, as frozen dataclasses.

A message travels as one msgpack map of at most `MESSAGE_BYTES` (see `codec`); anything larger is a blob and travels in
pieces (see `chunks`). Times are durations in seconds: no clock of another machine is trusted. Bytes of memory are counted
above the worker's own base, the resident size of a worker that has loaded its engine and trained nothing yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from wire.errors import TooLarge
from wire.schema import Amount, Digest, Fraction, Limit, Name, Natural, Positive, Text, Token
from wire.spec import Structure

MESSAGE_BYTES = 65_536
PIECE_BYTES = 61_440
PIECES_MAX = 262_144

ORDER = b"nestling order\0"
"""What stands before an order's bytes when they are signed, so that the signature is good for nothing else."""

Verb = Literal["train", "score", "calibrate", "evaluate"]
Form = Literal["", "bfloat16", "float16", "int8"]
Loss = Literal["cross_entropy", "binary_cross_entropy", "sum", "mean_squared_error"]
Reason = Literal["memory", "oom", "crash", "stalled", "data", "unsupported", "nonfinite", "cancelled", "busy"]


@dataclass(frozen=True, slots=True)
class BlobRef:
    """A blob by content.

    Attributes:
        digest: SHA-256, hex.
        size: Bytes in all; never 0.
        piece: Bytes of every piece but the last.

    Raises:
        TooLarge: It would be more than `PIECES_MAX` pieces, as many as the bitmap of an `Ack` has bits.
    """

    digest: Digest
    size: Positive
    piece: Annotated[int, Limit(1, 1 << 20)] = PIECE_BYTES

    def __post_init__(self) -> None:
        if self.pieces > PIECES_MAX:
            raise TooLarge(f"a blob of {self.pieces} pieces; the limit is {PIECES_MAX}")

    @property
    def pieces(self) -> int:
        """Count the pieces."""
        return -(-self.size // self.piece)


@dataclass(frozen=True, slots=True)
class Caps:
    """What a device brings.

    Attributes:
        runtime: Version of the software.
        engines: Names of the engines that load there, the best first.
        bytes_budget: Memory that one order may take above the base of a worker with the first of them.
        threads: Cores that training may use.
        samples: Training samples that it holds.
        classes: Classes of its data; 0 when unknown.
        input_shape: Shape of one sample; empty when unknown.
    """

    runtime: Name
    engines: Annotated[tuple[Name, ...], Limit(0, 8)]
    bytes_budget: Natural
    threads: Positive
    samples: Natural
    classes: Natural = 0
    input_shape: Annotated[tuple[Positive, ...], Limit(0, 4)] = ()


@dataclass(frozen=True, slots=True)
class Presence:
    """A device's retained state; the broker sends the `lost` one as its last will.

    Attributes:
        device: Its name, which is also its user name at the broker.
        state: ``online``, ``lost`` (advisory: the same boot may come back) or ``bye`` (takes no orders: it left on purpose,
            or its owner's conditions do not hold now; the same boot may come back then too).
        boot: Random name of this life of the agent.
        seq: Grows with every life; of two presences the higher one counts, whatever their order of arrival.
        caps: Present when online.
    """

    device: Name
    state: Literal["online", "lost", "bye"]
    boot: Token
    seq: Natural
    caps: Caps | None = None


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life, sent every `keepalive / 2` seconds and with every step of visible progress.

    Attributes:
        boot: As in `Presence`.
        seq: As in `Presence`.
        order: The order being worked on; empty when idle.
        done: Fraction of it that is done.
        bytes_peak: Highest memory above base so far in that order.
    """

    boot: Token
    seq: Natural
    order: Annotated[str, Limit(0, 16)] = ""
    done: Fraction = 0.0
    bytes_peak: Natural = 0


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train, as data.

    Attributes:
        rule: Name of the local training rule.
        epochs: Passes over the device's training samples.
        batch: Samples per step.
        rate: Learning rate.
        momentum: Of plain SGD; 0 for none.
        decay: L2 weight decay.
        clip: Greatest Euclidean norm of a step's gradient; 0 for no clipping.
        seed: Root of all randomness of this order.
        knobs: What else the rule understands. All that move weights by the recipe alone know ``adam``: above 0 they do it by
            Adam (Kingma and Ba, ICLR 2015) with its usual constants, fresh in every order, and make no use of `momentum`.
        form: How the update's values are written (see `forms`); what that loses is added to the device's next update.
        steps: Batches in all, over as many passes as that takes; 0 for as many as `epochs` make.
        loss: ``cross_entropy`` of the softmax; ``binary_cross_entropy`` of each output against one-hot targets, the mean
            over classes and samples (PruneFL's public code); ``sum`` of all outputs, which knows no labels (SynFlow);
            ``mean_squared_error`` of the outputs from one-hot targets, the mean over classes and samples.
    """

    rule: Name = "sgd"
    epochs: Positive = 1
    batch: Annotated[int, Limit(1, 65536)] = 32
    rate: Amount = 0.05
    momentum: Fraction = 0.0
    decay: Amount = 0.0
    clip: Amount = 0.0
    seed: Natural = 0
    knobs: Mapping[Name, float] = field(default_factory=dict)
    form: Form = ""
    steps: Natural = 0
    loss: Loss = "cross_entropy"


@dataclass(frozen=True, slots=True)
class Order:
    """What one device is asked to do in one round.

    Attributes:
        id: Names run, round, attempt and device; the same order sent again has the same id.
        run: The federation's run.
        round: Number of the round, from 1.
        device: Who is asked.
        verb: What to do.
        spec: The model (a `ModelSpec` in msgpack).
        shells: The weights, smallest shell first; shell k turns width k - 1 into width k. An empty shell is left out.
        structures: What to train (exactly one), or every width to evaluate.
        recipe: How to train.
        bytes_peak: Predicted peak above base, on the first of the device's engines that holds the order.
        seconds: Time until the coordinator stops waiting.
        masks: What is kept of which weights, a blob of kind ``masks``; None where the structure has no masks.
    """

    id: Token
    run: Token
    round: Natural
    device: Name
    verb: Verb
    spec: BlobRef
    shells: Annotated[tuple[BlobRef, ...], Limit(1, 64)]
    structures: Annotated[tuple[Structure, ...], Limit(1, 64)]
    recipe: Recipe
    bytes_peak: Natural = 0
    seconds: Amount = 0.0
    masks: BlobRef | None = None

    @property
    def blobs(self) -> tuple[BlobRef, ...]:
        """All blobs that the order needs."""
        masks = () if self.masks is None else (self.masks,)
        return (self.spec, *masks, *self.shells)


@dataclass(frozen=True, slots=True)
class Usage:
    """What the work cost, as the device's kernel counted it.

    Attributes:
        bytes_base: Resident size of the worker before the order.
        bytes_peak: Highest resident size during it, less `bytes_base`.
        bytes_budget: What was granted.
        seconds: Wall time of the work.
        micro_batch: Samples that went through the model at once.
        engine: Which engine ran.
    """

    bytes_base: Natural = 0
    bytes_peak: Natural = 0
    bytes_budget: Natural = 0
    seconds: Amount = 0.0
    micro_batch: Natural = 0
    engine: Annotated[str, Limit(0, 64)] = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """A device's answer to an order; it opens the upload of `update`.

    Attributes:
        order: Id of the order.
        device: Who answers.
        boot: As in `Presence`.
        structure: What was trained; may be narrower than asked.
        update: Trained minus received weights, a blob; None when the verb makes none.
        keep: Digest of the device's own state that goes with this reply; empty when there is none.
        samples: Training samples behind it.
        metrics: For example ``loss``, ``accuracy.before``, ``accuracy.after``, or ``accuracy.K`` for each width K.
        usage: What it cost.
    """

    order: Token
    device: Name
    boot: Token
    structure: Structure
    update: BlobRef | None
    keep: Annotated[str, Limit(0, 64)]
    samples: Natural
    metrics: Mapping[Name, float]
    usage: Usage


@dataclass(frozen=True, slots=True)
class Refusal:
    """A device will not, or could not, do an order.

    Attributes:
        order: Id of the order.
        device: Who refuses.
        boot: As in `Presence`.
        reason: One word for programs.
        detail: One sentence for people.
        bytes_needed: What the order would take above base, as predicted or as seen.
        bytes_free: What this device grants.
    """

    order: Token
    device: Name
    boot: Token
    reason: Reason
    detail: Text = ""
    bytes_needed: Natural = 0
    bytes_free: Natural = 0


@dataclass(frozen=True, slots=True)
class Ack:
    """The coordinator's word on an upload.

    Attributes:
        order: Id of the order, which names the upload.
        state: ``more`` (send what `have` lacks), ``committed`` (durable and counted; promote the Keep) or ``unwanted``
            (the round is over or the order is not known; drop it).
        have: One bit per piece that is durable, lowest bit of the first byte first.
    """

    order: Token
    state: Literal["more", "committed", "unwanted"]
    have: Annotated[bytes, Limit(0, 32768)] = b""


@dataclass(frozen=True, slots=True)
class Need:
    """A device asks for pieces that the broker no longer has.

    Attributes:
        blob: Digest.
        order: For which order.
    """

    blob: Digest
    order: Token


@dataclass(frozen=True, slots=True)
class Cancel:
    """The coordinator no longer wants an order."""

    order: Token
    why: Text = ""


@dataclass(frozen=True, slots=True)
class Csr:
    """A device asks for a certificate: by invitation at first, over its own link from then on.

    Attributes:
        device: Its name.
        csr: The request, PKCS #10 in DER: a P-256 key, the name as common name.
        secret: The invitation's; empty over the device's own link.
    """

    device: Name
    csr: Annotated[bytes, Limit(1, 4096)]
    secret: Annotated[bytes, Limit(0, 64)] = b""


@dataclass(frozen=True, slots=True)
class Cert:
    """The coordinator's answer to a request for a certificate.

    Attributes:
        request: SHA-256 of the request's DER.
        state: ``granted``, or why not: the invitation is ``expired``, ``used`` or ``unknown``; it or the certificate is
            for another ``name``; the last certificate is too fresh to be replaced (``early``); no request (``malformed``).
        certificate: PEM; empty unless granted.
        seconds: How long it is valid from now on.
        detail: For people.
    """

    request: Digest
    state: Literal["granted", "expired", "used", "unknown", "name", "early", "malformed"]
    certificate: Annotated[bytes, Limit(0, 16384)] = b""
    seconds: Amount = 0.0
    detail: Text = ""


@dataclass(frozen=True, slots=True)
class Signed:
    """An order with the signature of the coordinator's authority: a broker can carry it and not make it.

    Attributes:
        body: The bytes of an `Order` message.
        signer: Certificate of the key that signed, DER.
        signature: Ed25519, over ``nestling order`` and a zero byte and the body.
    """

    body: Annotated[bytes, Limit(1, 63_000)]
    signer: Annotated[bytes, Limit(1, 2048)]
    signature: Annotated[bytes, Limit(64, 64)]


@dataclass(frozen=True, slots=True)
class Lead:
    """The coordinator's retained state, its last will being the `offline` one.

    Attributes:
        state: ``online`` or ``offline``.
        boot: Random name of this life of the coordinator.
        run: The run it leads.
        keepalive: Seconds; a device that is silent for 1.5 times as long counts as lost.
    """

    state: Literal["online", "offline"]
    boot: Token
    run: Token
    keepalive: Annotated[float, Limit(0.5, 3600)] = 20.0
