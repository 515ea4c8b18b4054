"""The recipe machinery: merging, checking, messages, round trips."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_vit.config import (
    Duration,
    DurationField,
    InputError,
    Section,
    argument_texts,
    check,
    help_lines,
    import_part,
    load,
    part_names,
    plain,
    signature_section,
    to_yaml,
)


class Inner(Section):
    """Inner.

    Args:
        lr: learning rate
            of the peak
        length: how long
    """

    lr: float = 0.1
    length: DurationField = Duration(2, "epochs")
    kind: Literal["cosine", "constant"] = "cosine"


class Outer(Section):
    """Outer."""

    seed: int = 0
    inner: Inner = Inner()


def test_later_files_and_words_win(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 1\ninner: {lr: 0.5, kind: constant}\n")
    (tmp_path / "b.yaml").write_text("inner: {lr: 0.25}\n")
    values = load([tmp_path / "a.yaml", tmp_path / "b.yaml"], ["seed=3", "--inner.length=5 steps"])
    outer = check(Outer, values)
    assert (outer.seed, outer.inner.lr, outer.inner.kind, str(outer.inner.length)) == (3, 0.25, "constant", "5 steps")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "not valid YAML"),
        ("- 1\n- 2\n", "should hold keys and values"),
        ("a: 1\na: 2\n", "not valid YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load([tmp_path / "x.yaml"], [])


@pytest.mark.parametrize("word", ["seed", "=3", "3=seed", "a b=1"])
def test_words_that_are_no_override(word: str) -> None:
    with pytest.raises(InputError, match="should be key=value"):
        load([], [word])


def test_missing_file() -> None:
    with pytest.raises(InputError, match="no such file"):
        load([Path("/nowhere.yaml")], [])


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"sed": 1}, ["sed=1", "unknown key", "did you mean 'seed'?", "seed, inner"]),
        ({"inner": {"lrr": 1}}, ["inner.lrr=1", "did you mean 'lr'?", "lr, length, kind"]),
        ({"seed": "x"}, ["seed='x'", "integer"]),
        ({"inner": {"kind": "cosin"}}, ["inner.kind='cosin'", "'cosine' or 'constant'"]),
        ({"inner": {"length": "5 stepz"}}, ["inner.length='5 stepz'", "500 steps"]),
        ({"seed": "x", "sed": 1}, ["seed='x'", "sed=1"]),
    ],
)
def test_messages_name_key_value_allowed_and_nearest(values: dict, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        check(Outer, values)
    for part in parts:
        assert part in str(caught.value)


def test_round_trip_through_yaml(tmp_path: Path) -> None:
    outer = check(Outer, {"seed": 4, "inner": {"length": "7 steps", "lr": 2.4e-3}})
    (tmp_path / "r.yaml").write_text(to_yaml(outer))
    assert check(Outer, load([tmp_path / "r.yaml"], [])) == outer


@given(st.integers(1, 10**6), st.floats(0.1, 1e6))
def test_durations(steps: int, per_epoch: float) -> None:
    assert Duration.parse(f"{steps} steps").steps(per_epoch) == steps
    assert Duration.parse(f"{steps}steps") == Duration(steps, "steps")
    assert Duration.parse(steps).steps(per_epoch) == round(steps * per_epoch)
    assert Duration.parse(plain(Duration(steps, "steps"))) == Duration(steps, "steps")
    assert Duration.parse(plain(Duration(per_epoch, "epochs"))) == Duration(per_epoch, "epochs")


def test_ends_of_epochs_do_not_drift() -> None:
    """49,984 images in batches of 256 are 195.25 steps: the fifth multiple of 5 epochs is the end of 25 epochs."""
    every = Duration(5, "epochs")
    assert [step for step in range(4883) if every.due(step, 195.25)] == [977, 1953, 2929, 3905, 4882]
    assert [step for step in range(13) if Duration(4, "steps").due(step, 195.25)] == [4, 8, 12]
    assert [step for step in range(4) if Duration(0.1, "epochs").due(step, 4.5)] == [1, 2, 3], "at most once a step"


@pytest.mark.parametrize("value", [True, "x", "-1", "1.5 steps", "3 apples", None])
def test_no_durations(value: object) -> None:
    with pytest.raises(ValueError, match="should be"):
        Duration.parse(value)


class Part:
    """A part.

    Args:
        encoder: filled by the program
        size: how large, over
            two lines
        name: what it is called
    """

    def __init__(self, encoder: object, size: int = 3, name: Literal["a", "b"] = "a") -> None: ...


def test_open_sections_follow_the_constructor() -> None:
    section = signature_section(Part, skip=("encoder",))
    assert check(section, {"size": 5}).model_dump() == {"size": 5, "name": "a"}
    with pytest.raises(InputError, match=r"objective\.sise=5.*did you mean 'size'"):
        check(section, {"sise": 5}, "objective")
    with pytest.raises(InputError, match=r"objective\.name='c'"):
        check(section, {"name": "c"}, "objective")
    assert argument_texts(Part)["size"] == "how large, over two lines"


def test_help_names_every_key() -> None:
    text = "\n".join(help_lines(Outer))
    assert "seed  (int; default 0)" in text
    assert "inner.lr  (float; default 0.1)  learning rate of the peak" in text
    assert "inner.length  (epochs or 'N steps'; default 2)" in text
    assert "inner.kind  ('cosine' | 'constant'; default 'cosine')" in text


def test_parts_are_chosen_by_file_name() -> None:
    assert "mae" in part_names("ssl_vit.objectives", "Objective")
    assert {"knn", "linear", "few_shot", "rank", "pictures"} <= set(part_names("ssl_vit.evaluation", "Evaluation"))
    assert import_part("ssl_vit.evaluation", "knn", "evals", "Evaluation").__name__ == "KNN"
    with pytest.raises(InputError, match=r"objective\.name='maee'.*did you mean 'mae'"):
        import_part("ssl_vit.objectives", "maee", "objective.name", "Objective")
    with pytest.raises(InputError, match="no such part"):
        import_part("ssl_vit.objectives", "base", "objective.name", "Objective")


def test_a_bare_no_is_a_precision() -> None:
    """YAML reads ``mixed_precision=no`` as false."""
    from ssl_vit.recipe import Recipe

    values = load([], ["mixed_precision=no"])
    assert check(Recipe, {**values, "objective": {}, "encoder": {}}).mixed_precision == "no"
