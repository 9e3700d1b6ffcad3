"""What layers over steps hold: gates and cells of every step, queries and what attention saw, gradients of some words."""

from __future__ import annotations

from collections.abc import Mapping

from wire.native.needs import Facts, Needs, Say

WORDS = 1 << 17
"""Entries of the gradient of an embedding's weight that are made at once, unless one word has more."""

TAKEN = 1 << 14
"""Entries of the output's gradient that are sorted by word at once, unless one word has more."""

SORTED = 512
"""Words that are sorted at once at most."""

SCORES = 1 << 16
"""Scores of attention that are made at once, unless one head of one sample has more."""


def words_at_once(known: int, width: int) -> int:
    """Say how many words' gradients are made at once."""
    return min(known, max(1, WORDS // width))


def taken_at_once(words: int, width: int) -> int:
    """Say how many words of a batch are sorted at once."""
    return min(words, SORTED, max(1, TAKEN // width))


def heads_at_once(steps: int, heads: int) -> int:
    """Say how many heads of a sample look at once."""
    return max(1, min(heads, SCORES // (steps * steps)))


def _lstm(facts: Facts) -> Needs:
    (steps, width), (_, hidden), batch = facts.inputs[0], facts.output, facts.batch
    state, gates = (batch, hidden), (batch, 4 * hidden)
    return Needs(
        saves={"gates": (batch, steps, 4 * hidden), "cells": (steps, *state)},
        forward={
            **dict.fromkeys(("gates", "more"), gates),
            **dict.fromkeys(("cell", "part"), state),
        },
        backward={
            **dict.fromkeys(("gates", "slopes"), gates),
            **dict.fromkeys(("hidden", "cell", "part"), state),
            "weight": (hidden * max(hidden, width),),
        },
        reads_input=True,
        reads_output=True,
    )


def _gru(facts: Facts) -> Needs:
    (steps, width), (_, hidden), batch = facts.inputs[0], facts.output, facts.batch
    state, gates = (batch, hidden), (batch, 3 * hidden)
    return Needs(
        saves={"gates": (batch, steps, 3 * hidden), "inner": (batch, steps, hidden)},
        forward={**dict.fromkeys(("gates", "more"), gates), **dict.fromkeys(("inner", "part"), state)},
        backward={
            "gates": gates,
            "slopes": (batch, 2 * hidden),
            **dict.fromkeys(("hidden", "carry", "part"), state),
            "weight": (hidden * max(hidden, width),),
        },
        reads_input=True,
        reads_output=True,
    )


def _embedding(facts: Facts) -> Needs:
    known, width = facts.params["weight"]
    taken = (taken_at_once(facts.batch * facts.output[0], width), width)
    return Needs(
        backward={"rows": (words_at_once(known, width), width), "taken": taken, "sums": taken}, reads_input=True
    )


def _attention(facts: Facts) -> Needs:
    (steps, width), inner = facts.inputs[0], facts.params["weight_out"][1]
    scores = (heads_at_once(steps, inner // facts.node.attrs["head"]), steps, steps)
    queries, seen = (steps, 3 * inner), (steps, inner)
    return Needs(
        saves={"queries": (facts.batch, *queries), "seen": (facts.batch, *seen)},
        forward={"scores": scores, "queries": queries, "seen": seen},
        backward={"scores": scores, "slopes": scores, "seen": seen, "asked": seen, "weight": (inner * width,)},
        reads_input=True,
    )


NEEDS: Mapping[str, Say] = {"lstm": _lstm, "gru": _gru, "embedding": _embedding, "attention": _attention}
