"""What a comparison says of densities by layer and of memory: medians over seeds, in text and in the picture."""

import pytest

from coordinator.simulate import compare_layers, compare_report
from coordinator.simulate.trials import Failure
from tests.unit.test_compare import found_of

CONV = ("conv1.weight", "conv2.weight", "fc1.weight", "out.weight")


def held(found, *layers, **told):
    """Give the runs of `found_of` these densities, run by run; `told` is what was told of the last round."""
    for (_, one), densities in zip(found, layers, strict=True):
        one["density_by_layer"] = {"conv1.bias": 1.0, **densities}
        one["curve"][-1]["facts"] = told
    return found


def lines_of(text, label):
    return [line.split() for line in text.splitlines() if line.startswith(label)]


def test_densities_are_medians_over_the_seeds_and_a_layer_kept_whole_is_shown():
    layers = [dict(zip(CONV, (1.0, 0.25, d, 0.5), strict=True)) for d in (0.125, 0.5, 0.25)]
    sparse = held(found_of({"a@0.2": [0.8, 0.9, 1.0]}), *layers, **{"density.conv1.weight": 1.0, "r2": 0.9})
    whole = held(found_of({"dense": [0.7]}), dict.fromkeys(CONV, 1.0))
    facts = compare_report.summed_up([*sparse, *whole], "0.5")
    a, dense = facts["summary"]
    assert a["density_by_layer"] == dict(zip(CONV, (1.0, 0.25, 0.25, 0.5), strict=True)), (
        "no bias, and not the first run's"
    )
    assert dense["density_by_layer"] == {}
    text = compare_report.text(facts)
    assert lines_of(text, "method")[-1] == ["method", "density", "conv1", "conv2", "fc1", "out"]
    assert lines_of(text, "a")[-1] == ["a", "0.2", "1.0000", "0.2500", "0.2500", "0.5000"]
    assert len(lines_of(text, "dense")) == 1, "no masks, no line"
    assert "density of each layer" not in compare_report.text(compare_report.summed_up(whole, "0.5"))


def test_a_failed_run_and_a_layer_that_another_model_lacks():
    found = held(
        found_of({"a@0.1": [0.8, 0.9], "b@0.1": [0.5]}), {"x.weight": 0.5}, {"x.weight": 0.5}, {"y.weight": 0.25}
    )
    found[0] = (found[0][0], Failure("it broke"))
    text = compare_report.text(compare_report.summed_up(found, "0.5"))
    assert lines_of(text, "a")[1] == ["a", "0.1", "0.5000", "-"]
    assert lines_of(text, "b")[1] == ["b", "0.1", "-", "0.2500"]


def test_of_many_layers_the_ends_are_shown():
    many = {f"l{i}.weight": i / 20 for i in range(1, compare_layers.SHOWN + 2)}
    text = compare_report.text(compare_report.summed_up(held(found_of({"a@0.3": [0.8]}), many), "0.5"))
    assert lines_of(text, "a")[-1] == ["a", "0.3", "0.0500", "l1", "0.3500", "0.6500", "l13"]
    assert "of 13 layers" in text


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Give what `plot` has drawn: its axes by their names."""
    plt = compare_report.pyplot()
    monkeypatch.setattr(plt, "close", lambda figure: None)

    def draw(found):
        path = compare_report.plot(compare_report.summed_up(found, "0.5"), tmp_path / "p.png")
        assert path.read_bytes().startswith(b"\x89PNG")
        return {axis.get_ylabel(): axis for axis in plt.gcf().axes}

    yield draw
    monkeypatch.undo()
    plt.close("all")


def test_the_picture_has_a_dot_for_each_layer_and_a_bar_for_each_peak(drawn):
    layers = [{"fc1.weight": d, "out.weight": 2 * d} for d in (0.2, 0.1, 0.05)]
    found = held(found_of({"a@0.2": [0.8], "a@0.1": [0.7], "b@0.2": [0.6]}), *layers)
    axes = drawn([*found, *held(found_of({"dense": [0.7]}), {"out.weight": 1.0})])
    dots, bars = axes["density of the layer at the end"], axes["predicted peak of memory, MiB"]
    assert [list(line.get_ydata()) for line in dots.get_lines()] == [[0.2, 0.4], [0.1, 0.2], [0.05, 0.1]]
    assert [tick.get_text() for tick in dots.get_xticklabels()] == ["fc1", "out"]
    assert dots.get_lines()[0].get_color() == dots.get_lines()[1].get_color() != dots.get_lines()[2].get_color()
    assert [bar.get_height() for bar in bars.patches] == pytest.approx([200 / 2**20] * 4)
    assert [tick.get_text() for tick in bars.get_xticklabels()] == ["0.2", "0.1", "0.2", ""]


def test_without_masks_the_picture_has_the_peaks_alone(drawn):
    axes = drawn(held(found_of({"a": [0.8], "b": [0.6]}), {"out.weight": 1.0}, {"out.weight": 1.0}))
    assert "density of the layer at the end" not in axes
    assert len(axes["predicted peak of memory, MiB"].patches) == 2
