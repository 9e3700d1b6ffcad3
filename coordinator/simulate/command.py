"""`coordinator simulate`: read the flags, run, show."""

from __future__ import annotations

import argparse
import json
import sys

from coordinator.flags import settings
from coordinator.simulate import outputs, report
from coordinator.simulate.run import simulate
from coordinator.simulate.watch import Screen
from coordinator.simulate.world import Config, Terms, named


def run_simulation(args: argparse.Namespace) -> int:
    """Run a simulation and print its result; with ``--json -`` the JSON object is all that is printed.

    Raises:
        NestlingError: Something that was asked for cannot work; the text says what to write.
    """
    config = config_of(args)
    outputs.ready(args.json)
    bare = args.json is not None and str(args.json) == "-"
    if bare:
        result = simulate(config, weights=args.weights)
        json.dump(result, sys.stdout)
        print()
        return 0
    with Screen(config.rounds) as screen:
        result = simulate(config, screen.show, args.weights)
    print(report.text(result))
    if args.json is not None:
        outputs.write(args.json, result)
    return 0


def config_of(args: argparse.Namespace) -> Config:
    """Read what to simulate from the flags.

    Raises:
        ConfigError: A change is no ``NAME=VALUE``.
    """
    return named(
        Config(
            algo=args.algo,
            model=args.model,
            data=args.data,
            partition=args.partition,
            fleet=args.fleet,
            weather=args.weather,
            devices=args.devices,
            rounds=args.rounds,
            seed=args.seed,
            terms=Terms(args.select, args.quorum, args.seconds),
            engine=args.engine,
            params={
                **settings(args.param, "--param"),
                **{f"recipe.{k}": v for k, v in settings(args.recipe, "--recipe").items()},
            },
        )
    )
