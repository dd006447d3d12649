"""The trackers that a recipe names, and whether their libraries are installed."""

import sys

import pytest

from higgstune.config.trackers import check_installed, missing_trackers, read_trackers
from higgstune.errors import ConfigError


def test_all_are_those_that_are_installed() -> None:
    assert "tensorboard" in read_trackers("all")
    check_installed(read_trackers("all"))


def test_a_tracker_without_its_library_is_refused_before_that_is_imported() -> None:
    before = set(sys.modules)
    with pytest.raises(ConfigError, match="report_to names wandb, whose library wandb is not installed"):
        check_installed(("tensorboard", "wandb"))
    assert set(sys.modules) == before


def test_missing_libraries_are_named() -> None:
    assert missing_trackers(("tensorboard", "wandb")) == ["report_to names wandb, whose library wandb is not installed"]


@pytest.mark.parametrize("value", [3, {"a": 1}, True])
def test_what_is_not_a_list_of_names_is_left_to_the_recipe(value: object) -> None:
    assert read_trackers(value) is value
