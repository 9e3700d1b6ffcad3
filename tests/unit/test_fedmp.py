"""FedMP against an explicit residual, FedAvg and sums by hand; who gets which ratio, and what is learnt from whom."""

import dataclasses
import math

import numpy as np
import pytest

from coordinator.algorithm import Answer, DeviceView, rng_of
from coordinator.algorithms import fedavg, fedmp
from coordinator.blocks import bandit, ratios
from coordinator.blocks.nesting import whole_of
from edge_runtime.engines import open_engine
from tests.long import nested
from tests.support.models import linear, random_arrays, small_cnn
from tests.support.sequences import STEPS, WIDTH, recurrent
from wire.errors import ConfigError, Malformed
from wire.memory import predict, uniform
from wire.messages import Recipe, Usage
from wire.spec import Structure, tensor_shapes
from wire.structure import cut, order_of, to_wire

SPEC = small_cnn()
AMPLE = 1 << 40


def start(seed=0, spec=SPEC, **params):
    return fedmp.init(spec, random_arrays(spec, Structure(), seed), {"policy": "uniform", **params})


def views(count, seconds=0.0, **more):
    return tuple(DeviceView(f"d{i}", AMPLE, samples=10, seconds_turn=seconds, **more) for i in range(count))


def answer(state, draft, seed=0, samples=10, metrics=None, update=None, took=0.0):
    update = random_arrays(SPEC, draft.structure, seed) if update is None else update
    return Answer(draft.device, samples, draft.structure, metrics or {}, Usage(), update, seconds_turn=took)


def at_ratios(state, *wanted):
    """Plan a round in which device i gets ratio i."""
    clients = {f"d{i}": ratio for i, ratio in enumerate(wanted)}
    original = fedmp._chosen
    try:
        fedmp._chosen = lambda scalars, known, devices, least, rng: {d.name: clients[d.name] for d in devices}
        return fedmp.plan(state, 1, views(len(wanted)), rng_of(0, 1))
    finally:
        fedmp._chosen = original


def kept_of(state, structure):
    """Give, by group, the set of canonical channels that a structure has."""
    return {g: set(order_of(levels)[: structure.widths[g][structure.capacity]]) for g, levels in state.levels.items()}


def mask_of(tensor, shape, kept):
    """Mark the entries of a whole tensor whose channels are all kept, one entry at a time."""
    mask = np.zeros(shape, bool)
    for index in np.ndindex(shape):
        here = zip(index, tensor.axes, strict=True)
        mask[index] = all(i // a.inner in kept[a.group] for i, a in here if a.group in kept)
    return mask


def spread(state, item):
    """Scatter a compact update in wire order over the whole canonical tensors, one entry at a time."""
    whole, kept = {}, kept_of(state, item.structure)
    orders = {g: order_of(levels) for g, levels in state.levels.items()}
    shapes = tensor_shapes(SPEC, Structure())
    for tensor in SPEC.tensors:
        array = np.zeros(shapes[tensor.name])
        for index, value in np.ndenumerate(item.update[tensor.name]):
            place = tuple(
                int(orders[a.group][i // a.inner]) * a.inner + i % a.inner if a.group in orders else i
                for i, a in zip(index, tensor.axes, strict=True)
            )
            array[place] = value
        whole[tensor.name] = (array, mask_of(tensor, shapes[tensor.name], kept))
    return whole


def test_joining_is_that_of_explicit_residuals():
    state, drafts = at_ratios(start(), 0.0, 0.3, 0.55, 0.9)
    answers = tuple(answer(state, draft, seed=i) for i, draft in enumerate(drafts))
    after = fedmp.close(state, answers)
    recovered = {name: [] for name in state.weights}
    for item in answers:
        for name, (move, mask) in spread(state, item).items():
            x = state.weights[name].astype(np.float64)
            sparse = np.where(mask, x, 0.0)
            residual = x - sparse
            local = np.where(mask, x + move, 0.0)
            recovered[name].append(local + residual)
    for name, models in recovered.items():
        np.testing.assert_allclose(after.weights[name], np.mean(models, axis=0), rtol=0, atol=1e-6)


def test_what_nobody_trained_stays_to_the_bit():
    state, drafts = at_ratios(start(), 0.5, 0.8)
    after = fedmp.close(state, tuple(answer(state, draft, seed=i) for i, draft in enumerate(drafts)))
    widest = max((draft.structure for draft in drafts), key=lambda s: s.capacity)
    kept = kept_of(state, widest)
    for tensor in SPEC.tensors:
        mask = mask_of(tensor, state.weights[tensor.name].shape, kept)
        assert np.array_equal(after.weights[tensor.name][~mask], state.weights[tensor.name][~mask])
        assert not np.array_equal(after.weights[tensor.name], state.weights[tensor.name])


def test_ratio_0_for_all_is_unweighted_fedavg_to_the_bit():
    state, drafts = at_ratios(start(), 0.0, 0.0, 0.0)
    assert all(draft.structure == whole_of(state) for draft in drafts)
    # FedMP's mean does not look at samples; FedAvg's is given equal ones.
    ours = tuple(answer(state, draft, seed=i, samples=5 + 20 * i) for i, draft in enumerate(drafts))
    theirs = tuple(dataclasses.replace(a, samples=7, structure=Structure()) for a in ours)
    after, wanted = fedmp.close(state, ours), fedavg.close(fedavg.init(SPEC, state.weights, {}), theirs)
    for name in state.weights:
        assert np.array_equal(after.weights[name], wanted.weights[name])


def test_pruning_and_recovering_without_training_changes_nothing():
    state, drafts = at_ratios(start(), 0.2, 0.5, 0.8)
    still = {d.device: {n: np.zeros_like(v) for n, v in random_arrays(SPEC, d.structure).items()} for d in drafts}
    after = fedmp.close(state, tuple(answer(state, d, update=still[d.device]) for d in drafts))
    for name in state.weights:
        assert np.array_equal(after.weights[name], state.weights[name])


def test_one_device_alone_gets_back_what_it_trained():
    state, drafts = at_ratios(start(), 0.5)
    item = answer(state, drafts[0], seed=3)
    after = to_wire(SPEC, fedmp.close(state, (item,)).weights, state.levels)
    sent = cut(SPEC, to_wire(SPEC, state.weights, state.levels), drafts[0].structure)
    for name, array in cut(SPEC, after, drafts[0].structure).items():
        np.testing.assert_allclose(array, sent[name] + item.update[name], atol=1e-6)


def test_the_same_ratio_in_every_layer_and_the_largest_sums_stay():
    state, drafts = at_ratios(start(), 0.4, 0.7)
    counts = {draft.device: {g: c[draft.structure.capacity] for g, c in state.widths.items()} for draft in drafts}
    assert counts == {"d0": {"a": 4, "b": 8}, "d1": {"a": 2, "b": 4}}  # ceil(.6 * 6), ceil(.6 * 12); ceil(.3 * ...)
    sums = {"a": np.abs(state.weights["c.weight"]).sum((1, 2, 3)), "b": np.abs(state.weights["f.weight"]).sum(1)}
    for draft in drafts:
        for group, kept in kept_of(state, draft.structure).items():
            best = sorted(range(len(sums[group])), key=lambda c, s=sums[group]: (-s[c], c))
            assert kept == set(best[: len(kept)])


def test_the_whole_model_is_always_the_last_width_and_is_what_is_measured():
    state, drafts = at_ratios(start(), 0.5, 0.5)
    assert state.scalars["ratios"] == [0.5, 0.0]
    assert {draft.structure.capacity for draft in drafts} == {0}
    assert state.widths == {"a": (3, 6), "b": (6, 12)}


def test_more_ratios_than_widths_are_rounded_to_narrower_ones():
    wanted = np.linspace(0.0, 0.8, 100)
    state, drafts = at_ratios(start(), *wanted)
    steps = state.scalars["ratios"]
    assert len(steps) <= 64
    assert steps[-1] == 0.0
    by = {f"d{i}": ratio for i, ratio in enumerate(wanted)}
    for draft in drafts:
        got = steps[draft.structure.capacity]
        assert by[draft.device] - 1e-9 <= got < by[draft.device] + 0.8 / 63 + 1e-9


def test_a_device_gets_the_least_ratio_that_its_memory_holds():
    recipe = Recipe(batch=1, momentum=0.9, clip=2.0)
    limits = {
        name: predict(SPEC, uniform(SPEC, 1.0 - ratio), recipe).bound for name, ratio in [("half", 0.5), ("0", 0.0)]
    }
    devices = (
        DeviceView("half", limits["half"], samples=5),
        DeviceView("none", 1, samples=5),
        DeviceView("whole", limits["0"], samples=5),
    )
    params = {"ratio": 0.25, "recipe.batch": 1.0}
    state, drafts = fedmp.plan(start(**params), 1, devices, rng_of(0, 1))
    got = {draft.device: state.scalars["ratios"][draft.structure.capacity] for draft in drafts}
    assert got["whole"] == 0.25
    assert 0.25 < got["half"] <= 0.5
    assert "none" not in got
    assert all(draft.bytes_peak <= limits["half" if draft.device == "half" else "0"] for draft in drafts)


def settle(state, metrics, seconds):
    """Answer a round with these losses after these times, both by device, and plan the next one."""
    state, drafts = fedmp.plan(state, state.round + 1, views(len(metrics)), rng_of(0, state.round + 1))
    told = (answer(state, d, metrics=m, took=t) for d, m, t in zip(drafts, metrics, seconds, strict=True))
    state = fedmp.close(state, tuple(told))
    return fedmp.plan(state, state.round + 1, views(len(metrics)), rng_of(0, state.round + 1))[0]


def test_the_papers_reward_by_hand():
    state = start(policy="eucb")
    state = settle(state, [{"loss.first": 2.0, "loss": 1.5}, {"loss.first": 2.0, "loss": 2.6}], [1.0, 3.0])
    clients = ratios.read(state)
    assert clients["d0"].rewards[-1] == pytest.approx((2.0 - 1.5) / 1.0), "its first answer: first pass less last"
    assert clients["d1"].rewards[-1] == pytest.approx((2.0 - 2.6) / 1.0), "a loss that grew earns less than nothing"
    state = settle(state, [{"loss.first": 9.0, "loss": 1.2}, {"loss.first": 9.0, "loss": 2.0}], [2.0, 2.0])
    clients = ratios.read(state)
    assert clients["d0"].rewards[-1] == pytest.approx((1.5 - 1.2) / (0.1 * 2.0)), "then last round's less this one's"
    assert clients["d0"].ratios[-1] in state.scalars["ratios"] or clients["d0"].ratios[-1] < 0.9
    assert [turn.seconds for turn in clients["d0"].turns] == [1.0, 2.0]


def told(label, **more):
    """Start as the committed tables do."""
    return start(**{n: text if n == "policy" else float(text) for n, text in nested.OWN[label].items()}, **more)


def test_the_table_as_published_is_the_bandit_as_published():
    """Rewards as they are, however large where times are all but equal, and the whole confidence term of the textbook."""
    state = told("eucb", granularity=0.9)
    state = settle(state, [{"loss.first": 2.0, "loss": 1.5}, {"loss.first": 2.0, "loss": 2.6}], [1.0, 1.002])
    state = settle(state, [{"loss.first": 2.0, "loss": 1.2}, {"loss.first": 2.0, "loss": 2.0}], [3.0, 1.0])
    clients, terms = ratios.read(state), fedmp._terms(state.scalars["params"])
    for name, earned in (("d0", (0.5 / 0.001, 0.3 / 1.0)), ("d1", (-0.6 / 0.001, 0.6 / 1.0))):
        one = clients[name].bandit
        assert one.rewards == pytest.approx(earned, rel=1e-6)
        discount = state.scalars["params"]["discount"]
        by_leaf = {}
        for age, (ratio, reward) in enumerate(zip(reversed(one.ratios), reversed(one.rewards), strict=True)):
            leaf = max(edge for edge in one.edges[:-1] if edge <= ratio)
            by_leaf.setdefault(leaf, []).append((discount**age, reward))
        plays = 1.0 + discount
        wanted = [
            sum(n * reward for n, reward in by_leaf[leaf]) / (count := sum(n for n, _ in by_leaf[leaf]))
            + math.sqrt(2.0 * math.log(plays) / count)
            if leaf in by_leaf
            else math.inf
            for leaf in one.edges[:-1]
        ]
        assert bandit.indices(one, terms) == pytest.approx(wanted)
    tuned = fedmp._terms(told("eucb-clipped").scalars["params"])
    assert (tuned.padding, tuned.clip) == (0.1, 0.95)
    assert {"eucb=fedmp", "eucb-clipped=fedmp"} <= set(nested.TABLES["ratios"].algos.split(","))


def test_the_bounded_reward_by_hand():
    state = settle(
        start(policy="bounded"), [{"loss.first": 2.0, "loss": 1.5}, {"loss.first": 2.0, "loss": 2.6}], [1.0, 4.0]
    )
    clients = ratios.read(state)
    assert clients["d0"].rewards == (pytest.approx(0.25 / 4.0),)
    assert clients["d1"].rewards == (0.0,)


def test_a_device_that_says_nothing_still_tells_its_time():
    state = settle(start(policy="eucb"), [{}, {"loss": math.nan, "loss.first": 1.0}], [1.0, 4.0])
    clients = ratios.read(state)
    assert [len(clients[name].rewards) for name in ("d0", "d1")] == [0, 0]
    assert clients["d1"].turns[0].seconds == 4.0


def test_one_bandit_learns_what_a_round_of_all_devices_earned_by_hand():
    state = start(policy="deadline", curve="bandit", probes="0.8")
    for number, losses, took in ((1, ((4.0, 3.0), (4.0, 2.0)), (1.0, 2.0)), (2, ((3.0, 1.5), (3.0, 2.2)), (0.5, 4.0))):
        state, drafts = fedmp.plan(state, number, views(2), rng_of(0, number))
        told = [
            answer(state, d, metrics={"loss.first": f, "loss": e}, took=t)
            for d, (f, e), t in zip(drafts, losses, took, strict=True)
        ]
        common = state.scalars["common"]
        state = fedmp.close(state, told)
        if number == 1:
            assert common["played"] == [], "the first round is a probe, which the bandit does not choose"
            assert state.scalars["common"]["rewards"] == []
    assert common["played"][0] == 2
    after = state.scalars["common"]
    assert (after["ratios"], after["played"]) == ([common["played"][1]], [])
    assert after["rewards"] == [pytest.approx(((3.0 - 1.5) / 3.0 - 0.1) / 2.0 / 4.0)], (
        "half lost, a tenth gained, in 4 s"
    )


@pytest.mark.parametrize("policy", ["eucb", "bounded", "deadline"])
def test_the_same_seed_gives_the_same_ratios(policy):
    spec = small_cnn(channels=50, hidden=100)

    def sequence(seed):
        state, found = start(spec=spec, policy=policy), []
        for number in range(1, 8):
            state, drafts = fedmp.plan(state, number, views(3), rng_of(seed, number))
            found.append([state.scalars["ratios"][d.structure.capacity] for d in drafts])
            metrics = [{"loss.first": 2.0 / number + r, "loss": 1.0 / number} for r in found[-1]]
            moves = [random_arrays(spec, d.structure, number) for d in drafts]
            took = [0.1 + k * (1.0 - r) ** 2 for k, r in zip((1, 2, 4), found[-1], strict=True)]
            told = map(answer, [state] * 3, drafts, [0] * 3, [10] * 3, metrics, moves, took)
            state = fedmp.close(state, tuple(told))
        return found

    once = sequence(1)
    assert once == sequence(1)
    high = fedmp.PARAMS["high"]
    assert all(0.0 <= ratio <= high for line in once for ratio in line)
    if policy != "deadline":
        assert once != sequence(2)
        assert len({ratio for line in once for ratio in line}) > 10
        return
    probes = [float(word) for word in fedmp.PARAMS["probes"].split()]
    assert [set(line) for line in once[: len(probes)]] == [{ratio} for ratio in probes]
    assert once[-1] == sorted(once[-1]), "the slower, the smaller its model"
    assert once[-1][0] < once[-1][2]


def test_once_the_loss_is_low_the_deadline_grows_and_never_shrinks_again():
    spec, found = small_cnn(channels=50, hidden=100), []
    state = start(spec=spec, policy="deadline", grow=0.5, learnt=0.5)
    low = 0.5 * math.log(spec.classes) / 4.0
    for number, loss in enumerate([2.0] * 5 + [low] * 4 + [2.0] * 4, 1):
        state, drafts = fedmp.plan(state, number, views(3), rng_of(0, number))
        played = [state.scalars["ratios"][d.structure.capacity] for d in drafts]
        found.append((state.scalars["stretch"], played))
        moves = [random_arrays(spec, d.structure, number, 0.001) for d in drafts]
        told = {"loss.first": loss, "loss": loss}
        took = [k * (0.02 + (1.0 - r) ** 2) for k, r in zip((1, 2, 4), played, strict=True)]
        each = zip(drafts, moves, took, strict=True)
        state = fedmp.close(state, tuple(answer(state, d, 0, 10, told, m, s) for d, m, s in each))
    assert found[5][0] == 1.0
    assert found[8][0] == pytest.approx(2.0), "a quarter of the loss, to the power of a half"
    assert found[-1][0] == found[8][0]
    assert all(later < earlier for later, earlier in zip(found[8][1], found[5][1], strict=True))


def test_answers_of_another_ranking_are_refused():
    state, drafts = at_ratios(start(), 0.5)
    other = dataclasses.replace(drafts[0].structure, ranking="cd" * 32)
    with pytest.raises(Malformed, match="another ranking"):
        fedmp.close(state, (Answer("d0", 5, other, {}, Usage(), random_arrays(SPEC, other)),))


@pytest.mark.parametrize(
    ("params", "word"),
    [
        ({"policy": "best"}, "policy"),
        ({"curve": "straight"}, "curve"),
        ({"ratio": 1.0}, "ratio"),
        ({"high": 0.0}, "high"),
        ({"probes": "0.5 x"}, "probes"),
        ({"probes": ""}, "probes"),
        ({"probes": 25 * "0.5 "}, "probes"),
        ({"discount": 0.0}, "discount"),
        ({"granularity": 0.0}, "granularity"),
        ({"quantile": 1.5}, "quantile"),
        ({"padding": -1.0}, "padding"),
        ({"floor": 0.0}, "floor"),
        ({"trust": math.inf}, "trust"),
        ({"fade": 1.5}, "fade"),
        ({"grow": -1.0}, "grow"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_write(params, word):
    with pytest.raises(ConfigError, match=word):
        fedmp.init(SPEC, random_arrays(SPEC, Structure()), params)


def test_a_model_without_channels_to_cut_is_refused():
    with pytest.raises(ConfigError, match="no prunable channels"):
        fedmp.init(linear(), random_arrays(linear(), Structure()), {})


def test_a_pruned_lstm_is_the_masked_one_over_all_gates():
    spec = recurrent("lstm", 8, 6)
    state = start(spec=spec, seed=4)
    state, drafts = at_ratios(state, 0.3, 0.6)
    x = np.random.default_rng(2).standard_normal((5, STEPS, WIDTH)).astype(np.float32)
    for draft in drafts:
        kept = kept_of(state, draft.structure)
        masked = {}
        for tensor in spec.tensors:
            array = state.weights[tensor.name].copy()
            for place, axis in enumerate(tensor.axes):
                if axis.group in kept:
                    # Unit j is rows j, H + j, 2 H + j and 3 H + j of the gates, and column j of whatever reads it.
                    gone = [c not in kept[axis.group] for c in range(len(state.levels[axis.group]))]
                    np.moveaxis(array, place, 0)[np.tile(gone, axis.outer)] = 0.0
            masked[tensor.name] = array
        compact = cut(spec, to_wire(spec, state.weights, state.levels), draft.structure)
        assert compact["a.ih"].shape == (4 * len(kept["a"]), WIDTH)
        outputs = []
        for structure, arrays in ((draft.structure, compact), (Structure(), masked)):
            engine = open_engine("torch")()
            engine.load(spec, structure, arrays)
            outputs.append(engine.forward(x))
        np.testing.assert_allclose(*outputs, atol=1e-5)
        assert np.abs(outputs[0]).max() > 0.01
