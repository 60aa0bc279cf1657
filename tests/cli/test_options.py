"""--set: text to typed values."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest
from torch import Tensor

from fastgen.cli.options import config_types, parse_settings, parse_value, sample_types
from fastgen.nn.model import Config, Model


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("3", int, 3),
        ("-3", int, -3),
        ("1e-3", float, 1e-3),
        ("2", float, 2.0),
        ("true", bool, True),
        ("off", bool, False),
        ("mlp", str, "mlp"),
        ("3", str, "3"),
        ("none", int | None, None),
        ("3", int | None, 3),
        ("3", str | int, 3),
        ("None", str | None, None),
        ("64,64", tuple[int, ...], (64, 64)),
        ("(64, 32)", tuple[int, ...], (64, 32)),
        ("64", tuple[int, ...], (64,)),
        ("", tuple[int, ...], ()),
        ("0.9,0.99", tuple[float, float], (0.9, 0.99)),
        ("conv", Literal["conv", "mlp"], "conv"),
        ("[1, 2]", Any, [1, 2]),
        ("plain text", Any, "plain text"),
    ],
)
def test_values(text: str, kind: Any, value: Any) -> None:
    got = parse_value(text, kind)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("3.5", int, "expected whole number, got '3.5'"),
        ("abc", float, "expected number, got 'abc'"),
        ("maybe", bool, "expected true or false, got 'maybe'"),
        ("x", int | None, "expected whole number or none, got 'x'"),
        ("1,b", tuple[int, ...], "expected whole number, got 'b'"),
        ("1,2,3", tuple[int, int], "expected whole numbers separated by commas, got '1,2,3'"),
        ("cnn", Literal["conv", "mlp"], "expected conv or mlp, got 'cnn'"),
    ],
)
def test_wrong_values(text: str, kind: Any, message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        parse_value(text, kind)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig(Config):
    hidden: tuple[int, ...] = (8,)
    learning_rate: float = 1e-3


class Toy(Model):
    """A model with two sampling options."""

    def sample(self, n: int, *, key: Tensor | None = None, temperature: float = 1.0, mean: bool = False, **rest: Any) -> Tensor:
        raise NotImplementedError


def test_settings_of_a_config() -> None:
    kinds = config_types(ToyConfig)
    assert parse_settings(["hidden=4,4", "learning-rate=2e-4"], kinds, "toy") == {"hidden": (4, 4), "learning_rate": 2e-4}
    with pytest.raises(ValueError, match=r"toy has no option 'hiden'; did you mean 'hidden'\?"):
        parse_settings(["hiden=4"], kinds, "toy")
    with pytest.raises(ValueError, match="toy has no option 'event_shape'"):
        parse_settings(["event_shape=4"], kinds, "toy")
    with pytest.raises(ValueError, match="--set hidden: expected whole number, got 'a'"):
        parse_settings(["hidden=a"], kinds, "toy")
    with pytest.raises(ValueError, match="--set takes key=value, got 'hidden'"):
        parse_settings(["hidden"], kinds, "toy")


def test_settings_of_sample() -> None:
    toy = Toy(ToyConfig(event_shape=(2,)))
    assert sample_types(toy) == {"temperature": float, "mean": bool}
    assert sample_types(Model(ToyConfig(event_shape=(2,)))) == {}
