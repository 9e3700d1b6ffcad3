"""`coordinator compare`: algorithms side by side on the same fleet, split and seeds.

Every algorithm runs with every seed, and with every density if it knows one. What is finished is kept (see `trials`), what
fails is reported and the others go on. With ``--tune``, each method (at each density) first tries its configurations, at most
six, on a validation part with other seeds, and the better half again with the next ones; the best in the mean goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from coordinator import algorithms
from coordinator.flags import settings
from coordinator.recipes import merged
from coordinator.simulate import compare_report, outputs
from coordinator.simulate.crew import Ended, work
from coordinator.simulate.report import Result, drawable
from coordinator.simulate.trials import Failure, Store, Trial
from coordinator.simulate.world import Config, Terms, named
from wire.errors import ConfigError

CONFIGURATIONS_MAX = 6
PARAM_OF_DENSITY: Mapping[str, str] = {"prunefl": "target", "lotteryfl": "recipe.target"}
"""Algorithm to its parameter for the fraction of weights that it shall keep, where that is not called ``density``; some ask
for the fraction that goes, ``sparsity``."""
ROUNDS = "horizon"
"""The parameter that tells an algorithm how many rounds there will be."""
OWN = ("run.model", "run.fleet", "run.rounds")
"""What a method may have of its own, as if they were parameters: one that cannot cut, a narrower model; one whose rounds cost
less, more of them (it is then measured about as many times as the others)."""

Params = Mapping[str, float | str]
_SECONDS_BETWEEN = 30.0


@dataclass(frozen=True, slots=True)
class Method:
    """One thing that is compared.

    Attributes:
        label: Its name in the comparison.
        algo: Its algorithm.
        configurations: Parameters that it may run with; only one goes on.
    """

    label: str
    algo: str
    configurations: tuple[Params, ...]

    def keeping(self, density: float) -> Params:
        """Say in the algorithm's own words which fraction of the weights it shall keep; nothing when it has none."""
        known = algorithms.by_name(self.algo).PARAMS
        own = PARAM_OF_DENSITY.get(self.algo, "density")
        if own in known:
            return {own: density}
        return {"sparsity": round(1.0 - density, 9)} if "sparsity" in known else {}


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is compared.

    Attributes:
        base: What all runs have in common; its algorithm, seed and parameters are not used.
        methods: What is compared.
        densities: For the methods that know one.
        seeds: Of the runs that count.
        tuning_seeds: Of the runs that choose a configuration, rung by rung; none when nothing is chosen.
        target: When a run is fast enough to be asked how long it took, see `compare_report.target_of`.
    """

    base: Config
    methods: tuple[Method, ...]
    densities: tuple[float, ...]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[tuple[int, ...], ...]
    target: str

    def variants(self) -> Iterator[tuple[Method, float | None]]:
        """Give each method with each of its densities; one without is itself once."""
        for method in self.methods:
            for density in self.densities if self.densities and method.keeping(1.0) else (None,):
                yield method, density

    def tried(self) -> dict[str, int]:
        """Count by method the configurations that it chooses from; empty where nothing is chosen."""
        return {method.label: len(method.configurations) for method in self.methods} if self.tuning_seeds else {}

    def trial(self, method: Method, density: float | None, params: Params, seed: int, *, tuning: bool = False) -> Trial:
        """Make one run.

        Raises:
            ConfigError: The algorithm does not take these parameters.
        """
        known = algorithms.by_name(method.algo).PARAMS
        base = self.base
        rounds = _rounds(method.label, params.get("run.rounds", base.rounds))
        model, fleet = str(params.get("run.model", base.model)), str(params.get("run.fleet", base.fleet))
        horizon = {ROUNDS: float(rounds)} if ROUNDS in known else {}
        full = {**horizon, **({} if density is None else method.keeping(density)), **params}
        full = {name: value for name, value in full.items() if name not in OWN}
        try:
            merged(known, full)
        except ConfigError as error:
            raise ConfigError(f"{method.label}: {error}") from None
        every = max(1, base.terms.evaluate_every * rounds // base.rounds)
        terms = dataclasses.replace(base.terms, tuning=tuning, evaluate_every=every)
        base = dataclasses.replace(base, model=model, fleet=fleet, rounds=rounds)
        config = named(dataclasses.replace(base, algo=method.algo, seed=seed, params=full, terms=terms))
        return Trial(method.label, density, config)


def run_comparison(args: argparse.Namespace) -> int:
    """Run a comparison and print its result; with ``--json -`` the JSON object is all that is printed.

    Returns:
        0, or 4 when no run has given a result.

    Raises:
        NestlingError: Something that was asked for cannot work; the text says what to write.
    """
    comparison = _comparison(args)
    outputs.ready(args.json, args.plot, args.keep / "any.json")
    if args.plot is not None:
        drawable(args.plot)
    bare = args.json is not None and str(args.json) == "-"
    results = compare(comparison, Store(args.keep), args.jobs, sys.stderr if bare else sys.stdout)
    facts = compare_report.summed_up(results, comparison.target, comparison.tried())
    if bare:
        print(json.dumps(facts))
    else:
        print(compare_report.text(facts))
        if args.json is not None:
            outputs.write(args.json, facts)
    if args.plot is not None:
        compare_report.plot(facts, args.plot)
    return 4 if all(isinstance(found, Failure) for _, found in results) else 0


def compare(
    comparison: Comparison, store: Store, jobs: int, out: TextIO | None = None
) -> list[tuple[Trial, Result | Failure]]:
    """Choose configurations, if there are several, and do all runs.

    Args:
        comparison: What is compared.
        store: Where finished runs are kept, and taken from.
        jobs: How many processes.
        out: Where progress is told.

    Returns:
        Every run with what came of it: methods in their order, then densities, then seeds.

    Raises:
        NestlingError: Something that was asked for cannot work; the text says what to write.
    """
    out = out or sys.stdout
    variants = list(comparison.variants())
    chosen = _chosen(comparison, variants, store, jobs, out)
    trials = [
        comparison.trial(method, density, params, seed)
        for (method, density), params in zip(variants, chosen, strict=True)
        for seed in comparison.seeds
    ]
    return list(zip(trials, _done(trials, store, jobs, out, "runs"), strict=True))


def _chosen(
    comparison: Comparison, variants: Sequence[tuple[Method, float | None]], store: Store, jobs: int, out: TextIO
) -> list[Params]:
    """Choose a configuration for each method and density by what it is worth on the validation part (`_reached`).

    By successive halving (Jamieson and Talwalkar, AISTATS 2016): all have a run with each tuning seed of the first rung, the
    better half of them with each of the next, and so on; the best by the mean of its seeds goes on. One that fails is
    the worst.
    """
    worth: list[list[list[float]]] = [[[] for _ in method.configurations] for method, _ in variants]
    left = [list(range(len(each))) if len(each) > 1 else [] for each in worth]
    for rung in comparison.tuning_seeds:
        tries = [
            (each[number], comparison.trial(method, density, method.configurations[number], seed, tuning=True))
            for seed in rung
            for (method, density), each, numbers in zip(variants, worth, left, strict=True)
            for number in numbers
            if len(numbers) > 1
        ]
        name = f"seed{'s' * (len(rung) > 1)} {', '.join(map(str, rung))}"
        found = _done([trial for _, trial in tries], store, jobs, out, f"tuning runs, {name}")
        if found and all(isinstance(one, Failure) for one in found):
            raise ConfigError(f"every run with tuning {name} failed; see above, and --tuning-seeds")
        for (values, _), one in zip(tries, found, strict=True):
            values.append(-1.0 if isinstance(one, Failure) else _reached(one))
        left = [_better(each, numbers) for each, numbers in zip(worth, left, strict=True)]
    chosen = []
    for (method, density), each, numbers in zip(variants, worth, left, strict=True):
        best = max(numbers, key=lambda number: _mean(each[number]), default=0)
        chosen.append(method.configurations[best])
        if numbers:
            part = "" if density is None else f" at density {density:g}"
            said = ", ".join(_said(values) for values in each)
            print(f"tuned {method.label}{part}: {said}; goes on with {dict(chosen[-1])}", file=out, flush=True)
    return chosen


def _better(worth: Sequence[Sequence[float]], numbers: Sequence[int]) -> list[int]:
    """Give the better half of configurations, one more where they are odd, in their order."""
    best = sorted(numbers, key=lambda number: -_mean(worth[number]))
    return sorted(best[: -(-len(best) // 2)])


def _mean(values: Sequence[float]) -> float:
    """Judge a configuration by its runs; one that failed once is worse than all that did not."""
    return -1.0 if -1.0 in values else statistics.fmean(values)


def _said(values: Sequence[float]) -> str:
    seeds = f" ({len(values)} seeds)" if len(values) > 1 else ""
    return f"failed{seeds}" if _mean(values) < 0 else f"{_mean(values):.4f}{seeds}"


def _reached(result: Result) -> float:
    """Give the accuracy that a run ends with; of nested widths, which are compared one by one, their mean."""
    widths = result["accuracy"].get("by_width", {}).values()
    return statistics.fmean(widths) if widths else result["accuracy"]["full"] or 0.0


def _done(trials: Sequence[Trial], store: Store, jobs: int, out: TextIO, what: str) -> list[Result | Failure]:
    """Give what came of each run, after doing those that are not kept: all of the first seed, then of the next."""
    paths = [store.path(trial.config) for trial in trials]
    found: dict[Path, Result | Failure] = {}
    for path, trial in zip(paths, trials, strict=True):
        kept = store.read(trial.config)
        if kept is not None:
            found[path] = kept
    if trials:
        kept_text = f", {len(found)} of them finished earlier and kept in {store.folder}" if found else ""
        print(f"{what}: {len(trials)}{kept_text}", file=out, flush=True)
    rank = {seed: place for place, seed in enumerate(dict.fromkeys(t.config.seed for t in trials))}
    left = {path: trial for path, trial in zip(paths, trials, strict=True) if path not in found}
    ordered = sorted(left.items(), key=lambda item: rank[item[1].config.seed])
    began = heard = time.monotonic()
    ended = 0
    for event in work([(trial, path) for path, trial in ordered], jobs):
        trial, now = event.trial, time.monotonic()
        if isinstance(event, Ended):
            ended, heard = ended + 1, now
            kept = None if event.error else store.read(trial.config)
            one: Result | Failure = Failure(event.error or "its result cannot be read") if kept is None else kept
            found[store.path(trial.config)] = one
            rest = (now - began) / ended * (len(left) - ended)
            print(f"[{ended}/{len(left)}, {_time(rest)} left] {_line(event, one)}", file=out, flush=True)
        elif now - heard > _SECONDS_BETWEEN:
            heard = now
            accuracy = "" if event.accuracy is None else f", accuracy {event.accuracy:.4f}"
            print(f"  {trial.name}: round {event.round}/{trial.config.rounds}{accuracy}", file=out, flush=True)
    return [found[path] for path in paths]


def _line(event: Ended, found: Result | Failure) -> str:
    if isinstance(found, Failure):
        return f"{event.trial.name}: FAILED: {found.why.strip().splitlines()[-1]}"
    accuracy = found["accuracy"]["full"]
    worth = "not measured" if accuracy is None else f"accuracy {accuracy:.4f}"
    return f"{event.trial.name}: {worth}, {found['seconds_virtual']:.0f} s virtual, {event.seconds:.1f} s"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


# --- the flags -------------------------------------------------------------------------------------------------------


def _comparison(args: argparse.Namespace) -> Comparison:
    methods = _methods(args.algos, settings(args.set, "--set"), settings(args.recipe, "--recipe"), args.configs)
    several = [method.label for method in methods if len(method.configurations) > 1]
    if several and not args.tune:
        raise ConfigError(
            f"--configs has several configurations of {', '.join(several)}: add --tune to choose among them"
        )
    tuning = _rungs(args.tuning_seeds) if args.tune else ()
    seeds = _numbers(args.seeds, "--seeds", int)
    if args.tune and not tuning:
        raise ConfigError("--tuning-seeds: write at least one, such as 1000")
    if set(seeds) & {seed for rung in tuning for seed in rung}:
        raise ConfigError("--tuning-seeds: write other seeds than those of --seeds")
    if not seeds or min(seeds) < 0:
        raise ConfigError(f"--seeds {args.seeds}: write at least one whole number from 0 on, such as 0,1,2")
    densities = _numbers(args.densities, "--densities", float)
    if not all(0.0 < density <= 1.0 for density in densities):
        raise ConfigError(f"--densities {args.densities}: write numbers above 0 and at most 1, such as .2,.05")
    compare_report.target_of(args.target, [method.label for method in methods])
    return Comparison(
        base=Config(
            model=args.model,
            data=args.data,
            partition=args.partition,
            fleet=args.fleet,
            weather=args.weather,
            devices=args.devices,
            rounds=args.rounds,
            terms=Terms(args.select, args.quorum, args.seconds, args.evaluate_every),
            engine=args.engine,
        ),
        methods=methods,
        densities=densities,
        seeds=tuple(seeds),
        tuning_seeds=tuning,
        target=args.target,
    )


def _rounds(label: str, value: float | str) -> int:
    if isinstance(value, str) or value < 1 or not float(value).is_integer():
        raise ConfigError(f"{label}: run.rounds = {value}: write a whole number of rounds, such as 100")
    return int(value)


def _numbers(text: str, flag: str, kind: type[int | float]) -> tuple[Any, ...]:
    try:
        return tuple(kind(word) for word in text.split(",") if word)
    except ValueError:
        raise ConfigError(f"{flag} {text}: write numbers with commas between them") from None


def _rungs(text: str) -> tuple[tuple[int, ...], ...]:
    """Read tuning seeds: rungs with commas between them, of which a plus joins seeds that none is left out of."""
    rungs = (rung.split("+") for rung in text.split(",") if rung)
    found = tuple(_numbers(",".join(rung), "--tuning-seeds", int) if all(rung) else () for rung in rungs)
    seeds = [seed for rung in found for seed in rung]
    if not all(found) or len(set(seeds)) < len(seeds) or min(seeds, default=0) < 0:
        raise ConfigError(f"--tuning-seeds {text}: write different whole numbers from 0 on, such as 1000+1001,1002")
    return found


def _methods(text: str, sets: Params, recipe: Params, configs: Path | None) -> tuple[Method, ...]:
    """Read ``--algos``: names, or ``LABEL=NAME`` for the same algorithm with other settings, and lay settings over each."""
    names = [word.partition("=")[::2] if "=" in word else (word, word) for word in text.split(",") if word]
    labels = [label for label, _ in names]
    if not names or len(set(labels)) < len(labels):
        raise ConfigError(f"--algos {text}: write different names with commas between them; LABEL=NAME tells two apart")
    tried = {} if configs is None else _configurations(configs)
    for name in tried:  # one file may serve several comparisons
        if name not in (*labels, "*"):
            print(f"--configs: {name} is not compared; its configurations are left out", file=sys.stderr, flush=True)
    for name in (key.partition(".")[0] for key in sets):
        if name not in (*labels, "*"):
            raise ConfigError(
                f"settings for {name!r}, which is not compared; there are {', '.join(labels)}, and * for all"
            )
    methods = []
    for label, algo in names:
        known = algorithms.by_name(algo).PARAMS
        shared = {f"recipe.{name}": value for name, value in recipe.items()}
        for who in ("*", label):
            own = {key.partition(".")[2]: value for key, value in sets.items() if key.partition(".")[0] == who}
            shared |= {k: v for k, v in own.items() if who == label or k in (*known, *OWN) or k.startswith("recipe.")}
        options = tried.get(label, tried.get("*", [{}]))
        methods.append(Method(label, algo, tuple({**shared, **option} for option in options)))
    return tuple(methods)


def _configurations(path: Path) -> Mapping[str, list[Params]]:
    """Read ``{"METHOD or *": [{"PARAM": value, ...}, ...]}``.

    Raises:
        ConfigError: It is not that, or a method has more than `CONFIGURATIONS_MAX`.
    """
    try:
        found: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--configs {os.fspath(path)}: {error}") from error
    fits = isinstance(found, dict) and all(
        isinstance(group, list) and group and all(isinstance(option, dict) for option in group)
        for group in found.values()
    )
    if not fits:
        raise ConfigError(f'--configs {path}: write {{"METHOD": [{{"PARAM": value}}, ...]}}, and * for all methods')
    for name, group in found.items():
        if len(group) > CONFIGURATIONS_MAX:
            raise ConfigError(f"--configs {path}: {len(group)} of {name}; at most {CONFIGURATIONS_MAX} may be tried")
    return {name: [_floats(option) for option in group] for name, group in found.items()}


def _floats(option: Mapping[str, Any]) -> Params:
    return {name: float(value) if isinstance(value, int) else value for name, value in option.items()}
