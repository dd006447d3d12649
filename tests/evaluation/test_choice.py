"""The rule by which a checkpoint is chosen."""

import math

import pytest

from higgstune.config.expression import Expression
from higgstune.errors import ConfigError
from higgstune.evaluation.choice import Rule, choose
from higgstune.training.sample_eval import Candidates

GOOD = {"cap_rate": 0.0, "short_rate": 0.0, "loop_rate": 0.0, "wer": 0.05, "recording_wer": 0.04, "similarity": 0.8}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("wer", 0.05), ("-wer", -0.05), ("similarity - 2 * wer", 0.7), ("(1 + wer) / 2", 0.525),
        ("min(similarity, 0.5)", 0.5), ("max(wer, cap_rate)", 0.05), ("abs(wer - similarity)", 0.75),
    ],
)  # fmt: skip
def test_arithmetic(text: str, value: float) -> None:
    assert Expression(text).value(GOOD) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("wer <= recording_wer + 0.02", True), ("wer < 0.05", False), ("0 <= wer <= 0.1", True),
        ("wer < 0.01 or similarity > 0.7", True), ("not wer > 0.01 and similarity > 0.7", False),
        ("naturalness > 1", False), ("not naturalness > 1", False), ("wer / cap_rate > 0", False),
    ],
)  # fmt: skip
def test_conditions_hold_only_of_what_was_measured(text: str, holds: bool) -> None:
    assert Expression(text).holds(GOOD) is holds


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')", "wer.__class__", "[wer]", "wer ** 9", "'wer'", "wer if wer else 1",
        "wer :=", "min()", "min(wer)", "abs", "wer > 0 or wer.real", "wer == 1", "lambda: 1", "wer[0]", "min(*wer)",
        "1e999999 if 1 else 2", "x" * 501, "(" * 300, "", "abs(wer, wer)",
        "[" + "-" * 490 + "1]", "1 / (wer - 1) + 'a'", "+" * 400 + "wer",
    ],
)  # fmt: skip
def test_nothing_else_is_an_expression(text: str) -> None:
    with pytest.raises(ConfigError):
        Expression(text)


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no metric simlarity; the nearest is similarity"):
        Expression("simlarity")


def test_a_rule_that_needs_a_judge_says_so() -> None:
    with pytest.raises(ConfigError, match="needs wer, which is not measured"):
        Rule.of(["wer < 1"], None, ["cap_rate"], clips=9)


@pytest.mark.parametrize(
    ("measured", "rank", "gates"),
    [
        (["cap_rate"], "step", ["cap_rate <= 0.1"]),
        (["cap_rate", "wer"], "-wer", ["cap_rate <= 0.1"]),
        (["wer", "recording_wer", "similarity"], "similarity", ["wer <= recording_wer + 0.2"]),
        (["wer", "similarity_reference"], "similarity_reference", []),
    ],
)
def test_the_default_rule_is_of_what_is_measured(measured: list[str], rank: str, gates: list[str]) -> None:
    rule = Rule.of(None, None, measured, clips=10)
    assert (rule.rank.text, [gate.text for gate in rule.gates]) == (rank, gates)


def test_one_of_few_clips_may_fail() -> None:
    rule = Rule.of(None, None, ["cap_rate"], clips=4)
    assert [gate.text for gate in rule.gates] == ["cap_rate <= 0.25"]
    assert choose([{"cap_rate": 0.25, "step": 1}, {"cap_rate": 0.5, "step": 2}], rule).best == 0


def test_the_right_one_of_five() -> None:
    planted = [
        GOOD | {"similarity": 0.95, "cap_rate": 0.5},  # the most similar one does not stop
        GOOD | {"similarity": 0.9, "wer": 0.6},  # cannot be understood
        GOOD | {"similarity": 0.84},
        GOOD | {"similarity": 0.88},  # the best of the healthy ones
        GOOD | {"similarity": 0.6, "wer": 0.0},
    ]
    choice = choose(planted, Rule.of(None, None, list(GOOD), clips=50))
    assert (choice.best, choice.healthy) == (3, True)
    assert choice.broken == [["cap_rate <= 0.1"], ["wer <= recording_wer + 0.2"], [], [], []]


def test_where_none_is_healthy_the_one_that_breaks_the_fewest() -> None:
    sick = [GOOD | {"cap_rate": 1, "loop_rate": 1}, GOOD | {"cap_rate": 1, "similarity": 0.2}]
    choice = choose(sick, Rule.of(None, None, list(GOOD), clips=50))
    assert (choice.best, choice.healthy) == (1, False)


def test_what_was_not_measured_ranks_last_and_of_equals_the_later_is_best() -> None:
    rule = Rule.of([], "similarity", list(GOOD), clips=50)
    assert choose([{"similarity": -3.0}, {}], rule).best == 0
    assert choose([GOOD, GOOD], rule).best == 1
    assert math.isnan(choose([{}], rule).ranks[0])


def test_patience_counts_steps_without_a_better_one() -> None:
    candidates = Candidates(Rule.of([], "-wer", ["wer"], clips=4), patience=2)
    assert not candidates.add(0, {"wer": 0.0})  # where a stage starts nothing is trained
    assert candidates.add(10, {"wer": 0.5})
    assert not candidates.add(20, {"wer": 0.6})
    assert not candidates.exhausted
    assert candidates.add(30, {"wer": 0.4})
    assert not candidates.add(40, {"wer": 0.6})
    assert not candidates.add(50, {"wer": 0.7})
    assert candidates.exhausted
    summary = candidates.summary()
    assert (summary.step, summary.healthy, len(summary.candidates)) == (30, True, 5)
    assert not Candidates(Rule.of([], "-wer", ["wer"], clips=4), patience=None).exhausted
