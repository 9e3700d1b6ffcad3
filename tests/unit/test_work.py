"""One counter: whoever asks what a model multiplies hears the same, and what is only looked up is none of it."""

import pytest

from coordinator.blocks import deadline, pace, timecost
from tests.support import sequences
from tests.support.models import small_cnn
from wire import effort, work, zoo
from wire.masked import maskable
from wire.memory import uniform
from wire.spec import Structure

LANGUAGE = sequences.language()
SPECS = [
    *(pytest.param(zoo.by_name(name), id=name) for name in zoo.MODELS),
    *(pytest.param(spec, id=name) for name, (spec, _) in sequences.MODELS.items()),
    pytest.param(LANGUAGE, id="language"),
]


@pytest.mark.parametrize("spec", SPECS)
def test_all_who_plan_by_work_count_what_the_tables_count(spec):
    load = deadline.load_of(spec)
    for place in (0, 10, 50, 99):
        structure = uniform(spec, 1.0 - place / deadline.GRID)
        half, rest = divmod(work.per_sample(spec, structure, backward=False), 2)
        assert not rest
        assert load.work[place] == half
        assert pace.loads(spec, [structure]) == (half,)
    line, names = timecost.arithmetic(spec, maskable(spec)), set(maskable(spec))
    masked = [layer for layer in work.layers(spec, Structure()) if layer.tensor in names]
    assert (
        line.constant
        == timecost.OVERHEAD * sum(layer.flops(backward=False, dense_gradient=False) for layer in masked) / 2
    )


def test_a_language_model_by_hand():
    """Words are looked up; an LSTM of 32 reads 32 at each of 20 steps; 32 x 10 say which is next."""
    hand = 20 * 4 * 32 * (32 + 32) + 10 * 32
    assert hand == 164160
    assert deadline.load_of(LANGUAGE).work[0] == hand
    assert pace.loads(LANGUAGE, [Structure()]) == (hand,)
    narrow = Structure(0, {"units": (8,)}, "ab" * 32)
    assert pace.loads(LANGUAGE, [narrow]) == (20 * 4 * 8 * (32 + 8) + 10 * 8,)
    steps = effort.effort(LANGUAGE, Structure()).forward
    assert steps[0] == 4 * (20 + 20 * 32) / effort.TRAFFIC, "what is read and written, and no more"


def test_attention_multiplies_queries_with_keys_and_odds_with_values():
    """5 steps of 6 -> 8; 36 x 8 in and 8 x 12 out; twice 5 x 5 x 12; 40 -> 3."""
    hand = 5 * 6 * 8 + 5 * (36 * 8 + 8 * 12) + 2 * 5 * 5 * 12 + 40 * 3
    spec = sequences.attended()
    assert deadline.load_of(spec).work[0] == pace.loads(spec, [Structure()])[0] == hand
    narrow = Structure(0, {"heads": (1,)}, "ab" * 32)
    assert pace.loads(spec, [narrow])[0] == 5 * 6 * 8 + 5 * (9 * 8 + 8 * 3) + 2 * 5 * 5 * 3 + 40 * 3


def test_a_width_is_counted_once_and_masks_are_told_apart():
    spec = small_cnn()
    assert work.layers(spec, uniform(spec, 0.5)) is work.layers(spec, uniform(spec, 0.5))
    whole, masked = (work.layers(spec, s) for s in (Structure(), Structure(masks="ab" * 32, kept={"f.weight": 7})))
    assert [layer.kept for layer in whole] == [6 * 9, 12 * 54, 48]
    assert [layer.kept for layer in masked] == [6 * 9, 7, 48]
    assert [layer.weights for layer in whole] == [layer.weights for layer in masked]
