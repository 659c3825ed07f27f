"""How many collectives `all_reduce` and `all_gather` make."""

import collective_cases as cases
from collective_cases import GATHER
from workers import Workers


def test_a_dict_of_metrics_is_reduced_in_one_collective(two: Workers) -> None:
    expected = {f"metric {index}": index + 0.5 for index in range(30)}
    assert two.run(cases.metrics, count=30) == [([GATHER], expected)] * 2


def test_more_data_takes_one_collective_more(two: Workers) -> None:
    expected = {f"metric {index}": index + 0.5 for index in range(300)}
    assert two.run(cases.metrics, count=300) == [([GATHER, "all_reduce"], expected)] * 2


def test_a_few_rows_are_gathered_in_one_collective(two: Workers) -> None:
    assert two.run(cases.rows, count=3) == [([GATHER], [0.0] * 3 + [1.0] * 4)] * 2


def test_rows_that_are_many_on_one_rank_only_take_one_collective_more(two: Workers) -> None:
    assert two.run(cases.rows, count=128) == [([GATHER, "all_gather"], [0.0] * 128 + [1.0] * 129)] * 2
