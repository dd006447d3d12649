"""The verdict on a stage: not usable, usable, or none, and what is warned of."""

from typing import Any

import pytest

from higgstune.config.recipe import Stage
from higgstune.evaluation.verdict import Evidence, Verdict, chance_of, has_grown, is_warmup_too_long, judge

CHANCE = chance_of(1026)


def stage(**changes: Any) -> Stage:
    return Stage(**({"name": "s", "kind": "full", "max_steps": 10, "learning_rate": 1e-3} | changes))


def log(*losses: float, name: str = "eval_audio_loss") -> list[dict[str, float]]:
    """Validations at the steps 0, 10, 20, ..."""
    return [{"step": 10 * i, name: loss} for i, loss in enumerate(losses)]


def verdict(*losses: float, **changes: Any) -> Verdict:
    history = log(*losses)
    known: dict[str, Any] = {
        "stage": stage(), "path": "stages.0", "is_last": True, "step": 10 * max(0, len(losses) - 1),
        "planned_steps": 10, "warmup_steps": 0, "history": history, "base_history": history, "chance": CHANCE,
        "spoken": {"cap_rate": 0.0, "short_rate": 0.0}, "clips": 4, "modules": 50,
    }  # fmt: skip
    return judge(Evidence(**(known | changes)))


def test_chance_is_that_of_all_classes_of_a_head() -> None:
    assert pytest.approx(6.9334, abs=1e-4) == CHANCE


@pytest.mark.parametrize(
    ("loss", "outcome"),
    [
        (CHANCE, "not usable"), (CHANCE * 1.0099, "not usable"), (CHANCE * 0.9901, "not usable"),
        (CHANCE * 1.0101, "usable"), (CHANCE * 0.9899, "usable"), (5.0, "usable"), (float("nan"), "not usable"),
    ],
)  # fmt: skip
def test_a_loss_at_chance_is_not_usable(loss: float, outcome: str) -> None:
    found = verdict(9.0, loss)
    assert (found.outcome, found.base_loss, found.chance) == (outcome, 9.0, CHANCE)
    assert bool(found.reasons) == bool(found.advice) == (outcome == "not usable")


def test_the_loss_is_that_of_the_step_that_the_stage_ends_with() -> None:
    assert verdict(9.0, 5.0, CHANCE, step=10).outcome == "usable"
    assert verdict(9.0, 5.0, CHANCE, step=20).outcome == "not usable"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"idle": ["a.b"]}, "1 of the adapter's 50 modules change nothing, such as a.b"),
        ({"changes_base": False}, "hardly changes the base's logits"),
        ({"spoken": {"cap_rate": 0.5}}, "2 of 4 spoken clips never stop"),
        ({"spoken": {"short_rate": 1.0}}, "4 of 4 spoken clips last under a third of their text"),
        ({"spoken": {"cap_rate": 1.0}, "clips": 1}, "1 of 1 spoken clips never stop"),
        ({"spoken": {"cap_rate": 0.2}, "clips": 20}, "4 of 20 spoken clips never stop"),
    ],
)
def test_what_is_not_usable_whatever_the_loss(changes: dict[str, Any], reason: str) -> None:
    for losses in ((7.5, 5.0), ()):  # also without validation rows
        found = verdict(*losses, **changes)
        assert found.outcome == "not usable"
        assert reason in found.reasons[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"spoken": {"cap_rate": 0.25, "short_rate": 0.25}},  # one of four may fail
        {"spoken": {"cap_rate": 1.0, "short_rate": 1.0}, "is_last": False},
        {"spoken": {}},  # not measured
        {"spoken": {"wer": 1.0, "cap_rate": 0.0}},  # of a judge
    ],
)
def test_clips_count_in_the_last_stage_alone_and_judges_never(changes: dict[str, Any]) -> None:
    assert verdict(7.5, 5.0, **changes) == verdict(7.5, 5.0)


def test_without_validation_rows_it_is_not_judged() -> None:
    assert str(verdict()).startswith("no verdict: without validation rows")


@pytest.mark.parametrize(
    ("losses", "grew"),
    [((4, 6.1, 6.1), True), ((4, 6.1, 5, 6.1), False), ((4, 6, 6), False), ((4, 5, 7, 7, 3), True), ((4, 9), False)],
)
def test_a_loss_that_has_grown_at_two_validations_running_is_warned_of(losses: list[float], grew: bool) -> None:
    assert has_grown(log(*losses), stage()) == grew
    assert any("try stages.0.learning_rate=0.0001" in w for w in verdict(*losses).warnings) == grew


@pytest.mark.parametrize(
    ("warmup", "steps", "warned"), [(100, 4, True), (4, 4, True), (3, 4, False), (0, 4, False), (1, 1, False)]
)
def test_a_warm_up_that_takes_all_steps_is_warned_of(warmup: int, steps: int, warned: bool) -> None:
    assert is_warmup_too_long(warmup, steps) == warned
    found = verdict(7.5, 5.0, warmup_steps=warmup, planned_steps=steps)
    assert (found.outcome, any("stages.0.warmup_steps" in w for w in found.warnings)) == ("usable", warned)


def test_a_loss_above_the_bases_is_warned_of() -> None:
    found = verdict(5.0, 5.5, base_history=log(5.2))
    assert (found.outcome, found.base_loss) == ("usable", 5.2)
    assert found.warnings[0].startswith("the validation audio loss, 5.500, is above the base's, 5.200: it memorised")
    assert not verdict(5.0, 5.1, base_history=log(5.2)).warnings
    assert not verdict(5.0, 5.0001).warnings
    harmed = [*log(5.0, 5.5), {"step": 9, "audio_loss": 5.6}]
    assert verdict(5.0, 5.5, history=harmed).warnings[0].endswith("training did harm")


def test_a_stage_without_weight_of_audio_is_followed_by_its_text_loss() -> None:
    history = [{**a, **t} for a, t in zip(log(5, 9, 9), log(5, 4, 4, name="eval_text_loss"), strict=True)]
    changes = {"history": history, "base_history": history, "stage": stage(audio_weight=0.0)}
    assert not verdict(5, 9, 9, **changes).warnings
    assert verdict(5, 9, CHANCE, **changes | {"history": log(5, 9, CHANCE)}).outcome == "not usable"


def test_a_base_far_above_chance_is_warned_of() -> None:
    """A store of another codec: guessing would be better, and the loss falls all the same."""
    found = verdict(12.9, 12.3)
    assert found.outcome == "usable"
    assert found.warnings == [
        "the base's audio loss, 12.900, was far above chance, 6.933, before training: the codes may be of another "
        "codec, which `higgstune doctor --data` shows"
    ]
    assert not verdict(9.0, 8.0).warnings


@pytest.mark.parametrize(
    ("losses", "changes", "cause"),
    [
        ((9, 30, CHANCE), {}, "a learning rate that is too high: try stages.0.learning_rate=0.0001"),
        ((9, 30, CHANCE), {"stage": stage(learning_rate=1000)}, "learning_rate=0.001"),
        ((7.2, CHANCE), {"warmup_steps": 100}, "a warm-up that takes all steps: lower stages.0.warmup_steps"),
        ((7.5, 7.5), {"changes_base": False}, "too little training"),
        ((CHANCE, CHANCE), {}, "a base that does not know such audio"),
        ((5, 6), {"spoken": {"cap_rate": 1.0}}, "it memorised its clips"),
        ((6, 5), {"spoken": {"cap_rate": 1.0}}, "too little training, or transcripts that do not match"),
    ],
)  # fmt: skip
def test_the_likeliest_cause(losses: list[float], changes: dict[str, Any], cause: str) -> None:
    assert cause in verdict(*losses, **changes).advice


def test_it_is_one_line() -> None:
    text = str(verdict(5, CHANCE, warmup_steps=100))
    assert "\n" not in text
    assert text.startswith("not usable: its validation audio loss, 6.933, is that of chance")
    assert ". Warning: the warm-up of 100 steps" in text
    assert str(verdict(7.5, 5.0)) == "usable"


def test_losses_above_chance_and_the_bases_in_training_and_validation_are_not_usable() -> None:
    validations = log(5.0, 18.0)
    found = verdict(5.0, 18.0, history=[*validations, {"step": 9, "audio_loss": 20.0}])
    assert found.outcome == "not usable"
    assert "20.000 in training and 18.000 in validation, are above chance, and far above the base's" in str(found)
    learning = [*log(20.0, 18.0), {"step": 9, "audio_loss": 18.0}]
    assert verdict(20.0, 18.0, history=learning).outcome == "usable"
    memorised = [*validations, {"step": 9, "audio_loss": 0.5}]
    assert verdict(5.0, 18.0, history=memorised).outcome == "usable"


def test_what_to_try_is_given_as_settings() -> None:
    """The command line makes a command of them."""
    assert verdict(6.0, 5.0).change == ()
    assert verdict(4.0, CHANCE).change == ("stages.0.learning_rate=0.0001",)
    assert verdict(9.0, 8.0, changes_base=False).change == ("stages.0.max_steps=20",)
    epochs = stage(max_steps=None, epochs=2)
    assert verdict(9.0, 8.0, changes_base=False, stage=epochs).change == (
        "stages.0.epochs=null", "stages.0.max_steps=20",
    )  # fmt: skip
