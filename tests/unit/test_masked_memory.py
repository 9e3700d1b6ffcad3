"""What is counted of a masked model's file of values while an update is written."""

import pytest

from tests.unit.test_memory import WHOLE, mlp
from wire import memory
from wire.heap import lasting
from wire.masked import index_bytes
from wire.messages import Recipe
from wire.walk import Walk


@pytest.mark.parametrize(
    ("a", "b", "read"),
    [
        (200_000, 300_000, 4 * (200_000 + 300_000 + 1024 + 2048)),  # 2 MB, in one go
        (400_000, 900_000, 4 * 900_000),  # 5.2 MB, a tensor at a time: the largest
        (900_000, 200_000, 4 * 900_000),
    ],
)
def test_values_of_a_large_masked_model_are_read_one_tensor_at_a_time(a, b, read):
    spec = mlp(4096, 1024, 2048)
    masked = memory.Masked({"a.weight": a, "b.weight": b})
    values = 4 * (a + b + 1024 + 2048)
    index = sum(index_bytes(shape, count) for shape, count in (((1024, 4096), a), ((2048, 1024), b)))
    stays = lasting(Walk(spec, WHOLE, 1, backward=True, masked=masked)) + (4096 * 1024 + 2048 * 1024) // 8
    found = memory.predict(spec, WHOLE, Recipe(batch=1), masked=masked).peak
    assert found == stays + (values + index) + values + read, "trained weights, their lines, and what was received"
