"""Configs of schedulers as diffusers has them: what a class was made with, in ``scheduler_config.json`` and between classes.

A config made by either library is taken by the other. As upstream, an argument that was left at its default is not carried over
to another class, whose own default may differ, and what a class does not take is kept for the next one that does.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

__all__ = ["Configured", "FrozenConfig", "recorded"]

_UNSET = "_use_default_values"
_FILE = "scheduler_config.json"
_Self = TypeVar("_Self", bound="Configured")


class FrozenConfig(dict[str, Any]):
    """A dict whose items are attributes too, and stay as they are."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the config has no {name!r}; it has: {', '.join(self)}") from None

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a config does not change: make another scheduler with from_config(config, name=value)")

    __setitem__ = __delitem__ = __setattr__ = __delattr__ = update = pop = popitem = setdefault = clear = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenConfig, (dict(self),)


def recorded(init: Callable[..., None]) -> Callable[..., None]:
    """Constructor that keeps its arguments as ``config``."""
    signature = inspect.signature(init)
    defaults = {name: p.default for name, p in list(signature.parameters.items())[1:]}

    @functools.wraps(init)
    def wrapper(self: Configured, *args: Any, **kwargs: Any) -> None:
        given = dict(list(signature.bind(self, *args, **kwargs).arguments.items())[1:])
        self._arguments = {**defaults, **given}
        self._config = FrozenConfig({**self._arguments, _UNSET: [name for name in defaults if name not in given]})
        init(self, *args, **kwargs)

    return wrapper


class Configured:
    """``config``, and making an object from one: in memory, or in a folder.

    Attributes:
        config_name: the file in a folder.
        extras: arguments that diffusers does not have; they are written where they were given.
    """

    config_name: ClassVar[str] = _FILE
    extras: ClassVar[tuple[str, ...]] = ()
    _arguments: dict[str, Any]
    _config: FrozenConfig

    @property
    def config(self) -> FrozenConfig:
        """What the object was made with: ``config.name``, ``config["name"]``, ``config.get("name")``."""
        return self._config

    def register_to_config(self, **kwargs: Any) -> None:
        """Make these arguments the object's, as if it had been made with them: as pipelines amend configs of old.

        Raises:
            ValueError: for a value that this class does not support.
        """
        self.__dict__ = type(self).from_config(self._config, **kwargs).__dict__

    @property
    def _internal_dict(self) -> FrozenConfig:
        """``config`` by the name under which pipelines amend it."""
        return self._config

    @_internal_dict.setter
    def _internal_dict(self, config: Mapping[str, Any]) -> None:
        self.register_to_config(**{name: value for name, value in config.items() if name != _UNSET})

    @classmethod
    def from_config(cls: type[_Self], config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """An object from the config of any scheduler, of this library or of diffusers; ``kwargs`` go before it.

        Raises:
            TypeError: if it is not a mapping.
            ValueError: for a value that this class does not support.
        """
        if not isinstance(config, Mapping):
            raise TypeError(f"config must be a dict such as scheduler.config, got {type(config).__name__}")
        unset = config.get(_UNSET) or ()
        carried = {name: value for name, value in config.items() if name not in unset and name != _UNSET}
        names = list(inspect.signature(cls).parameters)
        arguments = {name: value for name, value in {**carried, **kwargs}.items() if name in names}
        made = cls(**arguments)
        rest = {name: value for name, value in carried.items() if name not in names and not name.startswith("_")}
        made._config = FrozenConfig({**rest, **made._config})
        unused = {name: value for name, value in kwargs.items() if name not in names}
        return (made, {**unused, **rest}) if return_unused_kwargs else made

    @classmethod
    def from_pretrained(
        cls: type[_Self],
        path: str | os.PathLike[str],
        subfolder: str | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Any:
        """From a folder of :meth:`save_pretrained`, here or in diffusers; nothing is downloaded.

        Raises:
            FileNotFoundError: if there is no ``scheduler_config.json``.
        """
        file = Path(path) / (subfolder or "") / _FILE
        if not file.is_file():
            hint = ", pass subfolder='scheduler'" if (Path(path) / "scheduler" / _FILE).is_file() else ""
            raise FileNotFoundError(f"{file} does not exist: only local folders are read{hint}")
        return cls.from_config(json.loads(file.read_text()), return_unused_kwargs, **kwargs)

    def to_json_string(self) -> str:
        """The text of ``scheduler_config.json``."""
        kept = {name: value for name, value in self.config.items() if not name.startswith("_")}
        for name in self.extras:
            if name in self.config[_UNSET]:
                del kept[name]
        return json.dumps({"_class_name": type(self).__name__, **kept}, indent=2, sort_keys=True, default=_plain) + "\n"

    def save_config(self, save_directory: str | os.PathLike[str]) -> None:
        """Write ``scheduler_config.json`` into a folder, which is made."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _FILE).write_text(self.to_json_string())

    save_pretrained = save_config

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


def _plain(value: Any) -> Any:
    """Arrays and tensors (``trained_betas``) as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written to {_FILE}")
