"""Comparisons whose runs are made up: what a run is worth is said by a function of its configuration."""

from __future__ import annotations

import argparse

from coordinator import cli
from coordinator.simulate import compare, crew, trials
from coordinator.simulate.world import Config


def asked(*words: str) -> compare.Comparison:
    args = cli._parser().parse_args(["compare", *words])
    assert isinstance(args, argparse.Namespace)
    return compare._comparison(args)


def a_result(config: Config, accuracy: float = 0.5):
    """What a run might have given: better by the round, dearer with a larger rate."""
    rate = float(config.params.get("recipe.rate", 0.1))
    curve = [
        {"round": n, "seconds_virtual": 10.0 * n * rate, "accuracy": accuracy * n / config.rounds if n % 2 == 0 else None,
         "bytes_up": 100 * n, "bytes_down": 200 * n, "flops": 1000 * n}
        for n in range(1, config.rounds + 1)
    ]  # fmt: skip
    last = {name: curve[-1][name] for name in ("seconds_virtual", "bytes_up", "bytes_down", "flops")}
    devices = [{"name": f"d{i}", "bytes_peak": 100 * i} for i in range(3)]
    return {
        "algo": config.algo, "seed": config.seed, "accuracy": {"full": accuracy}, "curve": curve, "devices": devices,
        "density_by_layer": {"out.weight": 0.5}, **last,
    }  # fmt: skip


def played(monkeypatch, worth):
    """Let `worth(config)` stand for the processes: an accuracy, or a text that says why there is none."""
    done = []

    def work(jobs, _):
        for trial, path in jobs:
            done.append(trial)
            found = worth(trial.config)
            if isinstance(found, float):
                trials.keep(path, trial.config, a_result(trial.config, found))
            yield crew.Progress(trial, 1, None)
            yield crew.Ended(trial, found if isinstance(found, str) else "", 0.1)

    monkeypatch.setattr(compare, "work", work)
    return done
