"""`coordinator ticket`: is the mask that an algorithm ends with a lottery ticket?

Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, as PruneFL asks it (Jiang et al., TNNLS 2022): an algorithm
runs to its end, and of what it found only the final masks are kept. Then three runs start again from round 0, with the same
devices, the same data in the same order and the same recipe:

* ``ticket``: the masks over the initial weights of the algorithm's own run;
* ``fresh``: the same masks over other initial weights;
* ``dense``: those initial weights without any mask.

The ticket holds when it is as good as the dense model, but for epsilon, and better than the fresh one, after as many rounds.
All three train plainly (rule `sgd`, algorithm `fixed`) by the algorithm's own recipe, without what it adds to training.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from coordinator.advance import load_state, save_state
from coordinator.algorithm import Arrays, Masks
from coordinator.algorithms import by_name, fixed
from coordinator.blocks.initial import initial_weights
from coordinator.blocks.masks import densities, density
from coordinator.recipes import merged
from coordinator.show import RunView, table
from coordinator.simulate import outputs
from coordinator.simulate.command import config_of
from coordinator.simulate.report import Result
from coordinator.simulate.run import Log, play
from coordinator.simulate.watch import Screen
from coordinator.simulate.world import Config, World, build
from wire.errors import ConfigError
from wire.messages import Recipe

Watch = Callable[[str, RunView], None]
"""Told after every round which run it is of and how that run stands."""

_FRESH = 1_000_003
_PLAIN = frozenset(f"recipe.{f.name}" for f in dataclasses.fields(Recipe) if f.name not in ("rule", "knobs", "seed"))


@dataclass(frozen=True, slots=True)
class Entrants:
    """What the three runs start from.

    Attributes:
        masks: The masks that are on trial.
        first: The weights that the algorithm itself started from.
        fresh: Other ones.
    """

    masks: Masks
    first: Arrays
    fresh: Arrays


def run_ticket(args: argparse.Namespace) -> int:
    """Run the experiment and print its result; with ``--json -`` the JSON object is all that is printed.

    Raises:
        NestlingError: Something that was asked for cannot work; the text says what to write.
    """
    config = config_of(args)
    outputs.ready(args.json)
    fresh = config.seed + _FRESH if args.fresh_seed is None else args.fresh_seed
    if args.json is not None and str(args.json) == "-":
        json.dump(experiment(config, args.epsilon, fresh), sys.stdout)
        print()
        return 0
    screens: dict[str, Screen] = {}
    with ExitStack() as shown:

        def watch(name: str, view: RunView) -> None:
            if name not in screens:
                shown.close()  # the one before is done
                print(f"{name}:", flush=True)
                screens[name] = shown.enter_context(Screen(config.rounds))
            screens[name].show(view)

        result = experiment(config, args.epsilon, fresh, watch)
    print(text(result))
    if args.json is not None:
        outputs.write(args.json, result)
    return 0


def experiment(config: Config, epsilon: float, fresh: int, watch: Watch | None = None) -> Result:
    """Run an algorithm to its end, then the three runs of `race`.

    Args:
        config: What to run.
        epsilon: Accuracy that the ticket may lack of the dense model.
        fresh: Seed of the other initial weights.
        watch: Told of every round.

    Raises:
        ConfigError: Epsilon or the seed makes no sense, or the algorithm ends without masks.
        NestlingError: The run itself cannot work.
    """
    if not 0.0 <= epsilon < 1.0:
        raise ConfigError(f"--epsilon {epsilon:g}: write a number from 0 to 1, such as 0.01")
    if fresh < 0 or fresh == config.seed:
        raise ConfigError(f"--fresh-seed {fresh}: write a whole number that is not --seed")
    with tempfile.TemporaryDirectory(prefix="ticket-") as folder:
        world, log = build(config, Path(folder)), Log()
        _run(world, log, config.algo, watch)
        masks = load_state(world.spool, log.state, world.spec).masks
        if not masks:
            raise ConfigError(f"algorithm {config.algo!r} ended without masks, so there is no ticket to try")
    first = initial_weights(world.spec, config.seed)
    entrants = Entrants(masks, first, initial_weights(world.spec, fresh))
    # An algorithm may settle a parameter at its start that nobody gave, such as a schedule by the horizon.
    settled = by_name(config.algo).init(world.spec, first, config.params).scalars["params"]
    runs = race(plain(dataclasses.replace(config, params=settled)), entrants, watch)
    return {
        "algo": config.algo,
        "model": config.model,
        "data": config.data,
        "partition": config.partition,
        "seed": config.seed,
        "fresh_seed": fresh,
        "rounds": config.rounds,
        "epsilon": epsilon,
        "density": density(masks),
        "density_by_layer": densities(masks),
        "source": outcome(log.view),
        "runs": runs,
        "holds": holds(runs, epsilon),
    }


def plain(config: Config) -> Config:
    """Give the configuration of the three runs: the same, with plain training by the algorithm's own recipe."""
    known = merged(by_name(config.algo).PARAMS, config.params)
    kept = {name: value for name, value in known.items() if name in _PLAIN or name == "schedule"}
    return dataclasses.replace(config, algo="fixed", params={**kept, "density": 1.0})


def race(config: Config, entrants: Entrants, watch: Watch | None = None) -> dict[str, Result]:
    """Train ``ticket``, ``fresh`` and ``dense``, each from round 0.

    Args:
        config: Of algorithm `fixed`; see `plain`.
        entrants: What they start from.
        watch: Told of every round.

    Returns:
        By name the outcome of each (see `outcome`).
    """
    runs = {}
    for name, weights, masks in (
        ("ticket", entrants.first, entrants.masks),
        ("fresh", entrants.fresh, entrants.masks),
        ("dense", entrants.first, {}),
    ):
        with tempfile.TemporaryDirectory(prefix="ticket-") as folder:
            world = build(config, Path(folder))
            state = dataclasses.replace(fixed.init(world.spec, weights, config.params), masks=masks)
            log = Log(state=save_state(world.spool, state).digest)
            _run(world, log, name, watch)
            runs[name] = outcome(log.view)
    return runs


def outcome(view: RunView) -> Result:
    """Sum up one run: final ``accuracy``, ``curve`` (round and accuracy), and how many ``answers`` it is made of."""
    measured = [(n, view.rounds[n].accuracy()) for n in sorted(view.rounds) if view.rounds[n].metrics]
    curve = [[number, found[max(found)]] for number, found in measured]
    answers = sum(len(one.replies) for one in view.rounds.values() if one.outcome == "closed")
    return {"accuracy": curve[-1][1] if curve else None, "curve": curve, "answers": answers}


def holds(runs: Mapping[str, Result], epsilon: float) -> bool:
    """Tell whether the ticket is as good as the dense model, but for epsilon, and better than the fresh one.

    Raises:
        ConfigError: A run has no accuracy.
    """
    ticket, fresh, dense = (runs[name]["accuracy"] for name in ("ticket", "fresh", "dense"))
    if None in (ticket, fresh, dense):
        raise ConfigError("no round of one of the runs was closed, so there is nothing to compare")
    return bool(ticket >= dense - epsilon and ticket > fresh)


def text(result: Result) -> str:
    """Lay the result out for people."""
    runs = result["runs"]
    starts = {"ticket": "initial, masked", "fresh": "other ones, masked", "dense": "initial, all"}
    rows = [[name, starts[name], f"{run['accuracy']:.4f}", str(run["answers"])] for name, run in runs.items()]
    rows.insert(0, [result["algo"], "initial", f"{result['source']['accuracy']:.4f}", str(result["source"]["answers"])])
    verdict = "the ticket holds" if result["holds"] else "the ticket does not hold"
    uneven = len({run["answers"] for run in runs.values()}) > 1
    warning = "\nthe runs had different numbers of answers, so that they do not compare well" if uneven else ""
    return (
        f"\n{result['rounds']} rounds of {result['model']} on {result['data']} ({result['partition']}), "
        f"masks of density {result['density']:.4f}\n"
        f"{table(['run', 'weights at the start', 'accuracy', 'answers'], rows)}\n"
        f"{verdict}: {runs['ticket']['accuracy']:.4f} against {runs['dense']['accuracy']:.4f} less {result['epsilon']:g} of "
        f"the dense model and {runs['fresh']['accuracy']:.4f} of the fresh start{warning}"
    )


def _run(world: World, log: Log, name: str, watch: Watch | None) -> None:
    for _ in play(world, log):
        if watch is not None:
            watch(name, log.view)
