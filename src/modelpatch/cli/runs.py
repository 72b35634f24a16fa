"""Runs as files: --config reads the options of a run, and every run that trains writes the file that repeats it."""

import json
import tomllib
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import modelpatch
from modelpatch.atomic import write_bytes
from modelpatch.errors import ConfigError
from modelpatch.plain_files import read_plain
from modelpatch.text import nearest

NOT_REPEATED = ("config", "quiet", "force", "restart")
QUIET: ContextVar[bool] = ContextVar("quiet", default=False)
CURRENT: ContextVar[tuple[str, dict[str, Any]] | None] = ContextVar("run", default=None)  # a verb, its options' values


def write_run(beside: Path) -> Path | None:
    """Write the options of the current run, if there is one: to `run.yaml` in a folder, `NAME.run.yaml` beside a file."""
    import yaml

    if (run := CURRENT.get()) is None:
        return None
    verb, given = run
    path = beside / "run.yaml" if beside.is_dir() else beside.with_suffix(".run.yaml")
    kept = {n: value for n, value in given.items() if n not in NOT_REPEATED and value not in (None, [], ())}
    values = json.loads(json.dumps({_key(n): value for n, value in kept.items()}, default=str))
    name = {"evaluate": "eval"}.get(verb, verb)
    text = yaml.safe_dump({"verb": name, **values}, sort_keys=False, allow_unicode=True, width=1000)
    head = f"# Written by modelpatch {modelpatch.__version__}. Run it again: modelpatch {name} --config {path}\n"
    write_bytes(path, (head + text).encode())
    return path


def load_run(ctx: Any, path: Path | None) -> Path | None:
    """Take the options of a command from a file, below those that its command line gives: a callback of --config.

    Raises `ConfigError` for a file that cannot be read, another verb's file and an unknown or mistyped option.
    """
    if path is None or ctx.resilient_parsing:
        return path
    import yaml

    try:
        text = read_plain(path).decode()
        given = tomllib.loads(text) if path.suffix.lower() == ".toml" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"--config {path} is not valid YAML or TOML: {reason}.") from error
    if not isinstance(given, dict):
        raise ConfigError(f"--config {path} holds {type(given).__name__}. Expected options, such as `epochs: 10`.")
    verb = given.pop("verb", None)
    if verb not in (None, ctx.info_name):
        raise ConfigError(f"--config {path} is a run of `{verb}`. Run: modelpatch {verb} --config {path}")
    known = {key: parameter for parameter in ctx.command.params for key in _keys(parameter)}
    values: dict[str, Any] = {}
    for key, value in given.items():
        parameter = known.get(str(key).replace("-", "_"))
        if parameter is None:
            hint = nearest(str(key), known)
            raise ConfigError(f"--config {path}: `{ctx.info_name}` has no option {str(key)[:80]!r}.{hint}")
        if value is not None:
            values[parameter.name] = _option_value(path, str(key), value, parameter)
    ctx.default_map = {**(ctx.default_map or {}), **values}
    return path


def _option_value(path: Path, key: str, value: Any, parameter: Any) -> Any:
    """A value of a file as the command line would give it: text, a list of texts, or true and false for a flag."""
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):
            raise ConfigError(f"--config {path}: {key} is {value!r}. Expected true or false.")
        return value
    listed = getattr(parameter, "multiple", False) or parameter.nargs != 1
    if listed and isinstance(value, dict):
        return [f"{name}={_text(item)}" for name, item in value.items()]
    items = value if listed and isinstance(value, list) else [value]
    if any(isinstance(item, dict | list) for item in items):
        expected = "a list of values" if listed else "one value"
        raise ConfigError(f"--config {path}: {key} is {str(value)[:80]}. Expected {expected}.")
    return [_text(item) for item in items] if listed else _text(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str).strip('"')


def _keys(parameter: Any) -> set[str]:
    """The spellings of an option in a file: its long names and its parameter's name, with underscores."""
    if parameter.name in NOT_REPEATED or parameter.name == "help":
        return set()
    longs = [opt.lstrip("-") for opt in parameter.opts if opt.startswith("--")]
    return {name.replace("-", "_") for name in [*longs, _key(parameter.name)]}


def _key(name: str) -> str:
    """A parameter's name in a file: `set` for the parameter `set_`, `fit` for `option`."""
    return {"option": "fit"}.get(name, name.rstrip("_"))
