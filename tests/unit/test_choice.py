"""Which engine does an order: what knows the ops, what fits, what was not tried yet, and then the clock."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime import choice
from edge_runtime.choice import Chosen, Means
from edge_runtime.memory import plan as planning
from edge_runtime.paces import Paces, kind
from edge_runtime.retry import Tries, Way
from edge_runtime.session import Failed as Refusing
from tests.support.messages import an_order
from wire import memory, prices, zoo
from wire.builders import Conv, cnn
from wire.errors import Unsupported
from wire.job import Done, Failed, Job
from wire.messages import Order, Recipe, Usage
from wire.spec import ModelSpec, Structure

SPEC = zoo.by_name("digits-cnn")
NORMS = cnn("norms", (1, 16, 16), 4, tuple(Conv(16, norm="batch") for _ in range(4)), (8,))
NATIVE, TORCH = Means("native", 0), Means("torch", 0)
MIB = 1 << 20
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def order_of(number: int = 1, *, batch: int = 32) -> Order:
    return replace(an_order("d0", number), structures=(Structure(),), recipe=Recipe(batch=batch, epochs=2))


def chosen(order: Order, spec: ModelSpec, means: list[Means], paces: Paces, steps: int = 10) -> Chosen:
    found = choice.choose(order, spec, means, {}, (paces, steps))
    assert isinstance(found, Chosen)
    return found


def test_each_engine_has_its_try_the_best_first_and_then_the_fastest_wins() -> None:
    paces, order = Paces(), order_of()
    what = choice.kind_of(order, SPEC)
    assert chosen(order, SPEC, [NATIVE, TORCH], paces).means.engine == "native"
    paces.learn(f"native {what}", 3.0)
    assert chosen(order, SPEC, [NATIVE, TORCH], paces).means.engine == "torch"
    paces.learn(f"torch {what}", 2.0)
    assert chosen(order, SPEC, [NATIVE, TORCH], paces).means.engine == "torch"
    paces.learn(f"native {what}", 1.0)
    paces.learn(f"native {what}", 1.0)
    assert chosen(order, SPEC, [NATIVE, TORCH], paces).means.engine == "native", "the median counts"


def test_loading_counts_where_the_engine_is_not_loaded() -> None:
    paces, order = Paces(), order_of()
    what = choice.kind_of(order, SPEC)
    paces.learn(f"native {what}", 2.0)
    paces.learn(f"torch {what}", 1.0)
    step = chosen(order, SPEC, [TORCH], paces).effort
    paces.learn("torch", 100 * step)
    assert chosen(order, SPEC, [NATIVE, TORCH], paces, 50).means.engine == "native"
    assert chosen(order, SPEC, [NATIVE, TORCH], paces, 200).means.engine == "torch"
    assert chosen(order, SPEC, [NATIVE, replace(TORCH, loaded=True)], paces, 50).means.engine == "torch"


def test_what_is_not_training_is_no_try() -> None:
    paces, order = Paces(), replace(order_of(), verb="evaluate")
    paces.learn(f"native {choice.kind_of(order, SPEC)}", 9.0)
    assert chosen(order, SPEC, [NATIVE, TORCH], paces).means.engine == "native"


def test_what_does_not_fit_is_not_tried_and_the_nearest_refusal_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    least = min(memory.predict(SPEC, Structure(), Recipe(batch=32), size).bound for size in (1, 32))
    small, large = replace(TORCH, bytes_budget=least - MIB), replace(TORCH, bytes_budget=64 * MIB)
    assert chosen(order_of(), SPEC, [replace(small, engine="other"), large], Paces()).means is large
    refused = choice.choose(order_of(), SPEC, [replace(small, engine="other", bytes_budget=1), small], {}, (Paces(), 1))
    assert isinstance(refused, planning.Refused)
    assert refused.bytes_free == least - MIB


def test_a_scale_is_the_engines_own() -> None:
    room = replace(TORCH, bytes_budget=int(1.5 * memory.predict(SPEC, Structure(), Recipe(batch=32)).bound))
    other = replace(room, engine="other")
    found = choice.choose(order_of(), SPEC, [room, other], {"torch": 100.0}, (Paces(), 1))
    assert isinstance(found, Chosen)
    assert found.means is other


def test_the_gradient_of_the_whole_batch_comes_before_time(monkeypatch: pytest.MonkeyPatch) -> None:
    order, paces = order_of(batch=64), Paces()
    whole = memory.predict(NORMS, Structure(), order.recipe)
    least = memory.predict(NORMS, Structure(), order.recipe, 1).bound
    tight, wide = Means("torch", least + 4096), Means("other", whole.bound)
    paces.learn(f"torch {choice.kind_of(order, NORMS)}", 1.0)
    paces.learn(f"other {choice.kind_of(order, NORMS)}", 100.0)
    assert chosen(order, NORMS, [tight], paces).fits.micro_batch < 64
    assert chosen(order, NORMS, [tight, wide], paces).means is wide


def test_an_op_that_an_engine_lacks_leaves_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = {"native": ("conv2d",)}
    monkeypatch.setattr(prices, "lacks", lambda engine, _: lacking.get(engine, ()))
    assert chosen(order_of(), SPEC, [NATIVE, TORCH], Paces()).means is TORCH
    with pytest.raises(Unsupported, match="engine 'native' has no conv2d"):
        choice.choose(order_of(), SPEC, [NATIVE], {}, (Paces(), 1))


def test_kinds_are_models_and_octaves_of_density() -> None:
    order = order_of()
    kept = {"conv2.w": 10, "fc1.w": 20}
    kept = dict.fromkeys([t.name for t in SPEC.tensors if len(t.axes) > 1][:2], 10)
    masked = replace(order, structures=(Structure(masks="m", kept=kept),))
    assert choice.kind_of(order, SPEC) == f"{order.spec.digest[:16]} dense"
    assert choice.kind_of(masked, SPEC).startswith(f"{order.spec.digest[:16]} d")
    assert [kind("a" * 64, share) for share in (1.0, 0.9, 0.5, 0.05, 0.01)] == [
        f"{'a' * 16} {word}" for word in ("dense", "d0", "d1", "d4", "d7")
    ]


class TestPaces:
    def test_they_outlive_a_restart_and_the_latest_five_count(self, tmp_path: Path) -> None:
        path = tmp_path / "paces.json"
        paces = Paces(path)
        for value in (90.0, 1.0, 2.0, 3.0, 4.0, 5.0):
            paces.learn("torch aa dense", value)
        paces.learn("torch", 7.0)
        assert Paces(path).ratio("torch", "aa dense") == 3.0
        assert (Paces(path).loading("torch"), Paces(path).loading("native")) == (7.0, 0.0)
        assert Paces(path).ratio("torch", "aa d1") is None

    def test_what_makes_no_sense_is_left_out(self, tmp_path: Path) -> None:
        paces = Paces(tmp_path / "nowhere" / "paces.json")
        for value in (0.0, -1.0, float("nan"), float("inf"), 1e12):
            paces.learn("torch aa dense", value)
        paces.learn("no/key", 1.0)
        assert paces.ratio("torch", "aa dense") is None
        paces.learn("torch aa dense", 2.0)
        assert paces.ratio("torch", "aa dense") == 2.0, "a disk that refuses costs no more than the next start"

    def test_it_stays_bounded(self, tmp_path: Path) -> None:
        path = tmp_path / "paces.json"
        paces = Paces(path)
        for i in range(300):
            paces.learn(f"torch m{i} dense", 1.0)
        assert path.stat().st_size < 1 << 16
        assert paces.ratio("torch", "m0 dense") is None
        assert Paces(path).ratio("torch", "m299 dense") == 1.0

    @pytest.mark.parametrize(
        "text",
        [
            "", "[]", "{", '{"version": 1}', '{"version": 2, "paces": {"torch": [1]}}', '{"version": 1, "paces": [1]}',
            '{"version": 1, "paces": {"torch": 1}}', '{"version": 1, "paces": {"torch": ["x"]}}',
            '{"version": 1, "paces": {"torch": [NaN]}}', '{"version": 1, "paces": {"torch": [-1]}}',
            '{"version": 1, "paces": {"../x": [1]}}', '{"version": 1, "paces": {"torch": [' + "1" * 400 + "]}}",
            "[" * 5000, " " * 70_000 + '{"version": 1, "paces": {"torch": [1]}}',
        ],
    )  # fmt: skip
    def test_a_file_of_somebody_else_is_as_good_as_none(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "paces.json"
        path.write_text(text)
        assert Paces(path).loading("torch") == 0.0

    @settings(max_examples=50, deadline=None)
    @given(plain=ANY_JSON)
    def test_nor_does_any_json_break_it(self, tmp_path_factory: pytest.TempPathFactory, plain: object) -> None:
        path = tmp_path_factory.mktemp("paces") / "paces.json"
        path.write_text(json.dumps({"version": 1, "paces": {"torch": plain, "native aa dense": [plain]}}))
        paces = Paces(path)
        assert paces.loading("torch") >= 0.0
        assert paces.ratio("native", "aa dense") is None or paces.ratio("native", "aa dense") > 0.0


def job_of(way: Way) -> Job:
    return Job(way.order, "s", (), "o", "", 0, way.micro_batch, 1, engine=way.means.engine)


def way_of(tries: Tries, order: Order, means: list[Means]) -> Way:
    way = tries.fit(order, SPEC, means)
    assert isinstance(way, Way)
    return way


def test_what_an_order_took_decides_on_the_next_one() -> None:
    tries, engines = Tries(), []
    for number, took in enumerate((9.0, 3.0, 3.0), 1):
        way = way_of(tries, order_of(number), [NATIVE, TORCH])
        engines.append(way.means.engine)
        done = Done(Structure(), "", None, "", "", 320, {}, Usage(engine=way.means.engine))
        tries.done(job_of(way), done, (took, 0.5))
    assert engines == ["native", "torch", "torch"]
    assert tries.paces.loading("torch") == 0.5
    assert tries.paces.ratio("torch", way.kind) == pytest.approx(3.0 / (way.effort * 2 * 10))


@pytest.mark.parametrize("reason", ["crash", "unsupported"])
def test_an_engine_that_dies_is_replaced_for_this_life_and_one_alone_is_refused(reason: str) -> None:
    tries = Tries()
    failed = Failed(reason, "died of signal 4", 0, 0)  # type: ignore[arg-type]  # a Literal
    first = way_of(tries, order_of(), [NATIVE, TORCH])
    assert tries.failed(job_of(first), failed, 1.0) is None
    assert tries.due == 1.5
    second = way_of(tries, order_of(), [NATIVE, TORCH])
    assert (first.means.engine, second.means.engine) == ("native", "torch")
    verdict = tries.failed(job_of(second), failed, 2.0)
    assert isinstance(verdict, Refusing)
    assert verdict.reason == reason
    again = way_of(tries, order_of(2), [NATIVE, TORCH])
    assert again.means.engine == "native", "an order that fails on every engine says nothing of any"
    assert tries.failed(job_of(again), failed, 3.0) is None
    done = Done(Structure(), "", None, "", "", 320, {}, Usage(engine="torch"))
    tries.done(job_of(way_of(tries, order_of(2), [NATIVE, TORCH])), done)
    assert way_of(tries, order_of(3), [NATIVE, TORCH]).means.engine == "torch"
    assert way_of(tries, order_of(4), [NATIVE]).means.engine == "native", "better than nothing"


def test_an_engine_that_failed_is_tried_again_for_a_model_that_no_other_has(monkeypatch: pytest.MonkeyPatch) -> None:
    tries, failed = Tries(), Failed("crash", "died", 0, 0)
    tries.paces.learn(f"native {choice.kind_of(order_of(), SPEC)}", 1.0)
    assert tries.failed(job_of(way_of(tries, order_of(), [NATIVE, TORCH])), failed, 1.0) is None
    done = Done(Structure(), "", None, "", "", 320, {}, Usage(engine="native"))
    tries.done(job_of(way_of(tries, order_of(), [NATIVE, TORCH])), done)
    assert way_of(tries, order_of(2), [NATIVE, TORCH]).means.engine == "native"
    for module in ("retry", "choice"):
        monkeypatch.setattr(f"edge_runtime.{module}.having", _only_torch)
    monkeypatch.setattr("edge_runtime.retry.lacks", lambda engine, _: () if engine == "torch" else ("gelu",))
    assert way_of(tries, order_of(3), [NATIVE, TORCH]).means.engine == "torch"


def _only_torch(_: ModelSpec, engines: Iterable[str]) -> tuple[str, ...]:
    assert "torch" in (found := tuple(engines)), found
    return ("torch",)


def test_after_running_out_of_memory_another_engine_is_asked_for_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes little enough on another engine is as good as a smaller part of a batch."""
    tiny = memory.Prediction(1, 1)
    monkeypatch.setattr(
        prices, "training", lambda engine: (lambda *_, **__: tiny) if engine == "other" else memory.predict
    )
    tries, order = Tries(), order_of()
    first = way_of(tries, order, [TORCH, Means("other", 0)])
    assert tries.failed(job_of(first), Failed("oom", "died", 0, 30 * MIB), 0.0) is None
    second = way_of(tries, order, [TORCH, Means("other", 0)])
    assert (second.means.engine, second.micro_batch) == ("other", 32)
