"""From a command line and YAML files to a `Config`: strict, and with all that is wrong at once."""

from __future__ import annotations

import difflib
import json
import re
from argparse import ArgumentError
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import yaml

from memfilter.config import Config, ConfigError, check, filled_in, settings_of


def parse(argv: list[str], description: str = "", usage: str | None = None) -> Config:
    """The configuration that a command line asks for; ``--help`` and ``--print_config`` print and exit.

    Args:
        description, usage: for ``--help``; by default the usage lists all settings.

    Raises:
        ConfigError: with every setting that is unknown, of the wrong type or out of range.
    """
    parser = _parser(description, usage)
    printing = any(word.startswith("--print_config") for word in argv)
    argv = [word for word in argv if not word.startswith("--print_config")]

    def build(arguments: list[str]) -> Config:
        parsed = parser.parse_args(arguments)
        for name in ("config", "print_config"):
            parsed.pop(name, None)
        return Config(**vars(parser.instantiate(parsed)))

    try:
        config, errors = build(list(_in_yaml(argv))), []
    except _UNREADABLE:
        # the parser stops at the first; what can be read is checked all the same
        good, errors = _sort_out(argv, build)
        config = build(good)
    if config.run_dir is None:  # which a file may say
        errors, config.run_dir = [*errors, "run_dir=null: expected text"], Config.run_dir
    config = filled_in(config)
    try:
        check(config)
    except ConfigError as error:
        errors += str(error).splitlines()
    if errors:
        raise ConfigError("\n".join(errors))
    if printing:
        print(yaml.safe_dump(asdict(config), sort_keys=False), end="")
        raise SystemExit(0)
    return config


@lru_cache
def _parser(description: str, usage: str | None):
    """Made once: a sweep reads hundreds of command lines, and reading one takes less time than making this."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        description=description, usage=usage, default_env=False, exit_on_error=False, allow_abbrev=False, print_config=None
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    parser.add_argument("--print_config", action="store_true", help="print what would be run, as such a file, and exit")
    parser.add_class_arguments(Config, as_group=False)
    return parser


# jsonargparse raises an ArgumentError, and what it meets in broken files as it comes; ArgumentError is an Exception only
_UNREADABLE = (ArgumentError, TypeError, ValueError, OSError)
_SECTIONS = {section for section, _ in settings_of(Config)}
_NUMBERS = {f"{section}.{setting.name}" for section, setting in settings_of(Config) if "float" in setting.type}
_NULLABLE = {f"{section}.{setting.name}" for section, setting in settings_of(Config) if "None" in setting.type}
_INFINITIES = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}


def _in_yaml(argv: list[str]) -> Iterator[str]:
    """YAML's infinity is .inf, and its None null; people write inf, and W&B's sweeps what Python prints."""
    name = ""
    for word in argv:
        before, (name, given, value) = name, word.removeprefix("--").partition("=")
        if before in _NUMBERS and word in _INFINITIES:
            yield _INFINITIES[word]
        elif name in _NUMBERS and value in _INFINITIES:
            yield f"--{name}={_INFINITIES[value]}"
        elif name in _NULLABLE and value == "None":
            yield f"--{name}=null"
        else:
            yield word


def _sort_out(argv: list[str], build: Callable[[list[str]], Config]) -> tuple[list[str], list[str]]:
    """Tries every setting by itself: (arguments that can be read, what is wrong with the others)."""
    known = {"run_dir": "str"} | {f"{section}.{setting.name}": setting.type for section, setting in settings_of(Config)}
    good, errors = [], []
    for name, value, where in _settings(argv, errors):
        kind = known.get(name.removesuffix("+"))  # --model.lora_targets+=x adds to a list
        if value is None and name in _SECTIONS:
            errors.append(f"{where}{name} is empty: leave it out, or say what is set")
            continue
        if kind is None:
            near = difflib.get_close_matches(name, known, n=1)
            errors.append(f"{where}{name} is no setting" + (f": did you mean {near[0]}?" if near else ", see --help"))
            continue
        if kind.startswith(("str", "Literal")) and isinstance(value, bool | int | float | list):  # YAML takes no and off for false
            errors.append(f"{where}{name}={value!r}: expected text, so write it in quotes")
            continue
        plain = value if isinstance(value, str) else json.dumps(value, default=str).replace("Infinity", "inf")
        argument = next(_in_yaml([f"--{name}={plain.replace('NaN', 'nan')}"]))
        try:
            build([argument])
            good.append(argument)
        except _UNREADABLE as error:
            reason = re.sub(r'^Parser key "[^"]*": ', "", " ".join(str(error).split()).split(" Given value")[0])
            if reason.startswith("Does not validate against any"):
                reason = f"expected {kind.replace(' | ', ' or ').replace('None', 'null')}"
            errors.append(f"{where}{name}={value!r}: {reason}")
    return good, errors


def _settings(argv: list[str], errors: list[str]) -> Iterator[tuple[str, object, str]]:
    """(name, value, where it stands) of every setting in the files and on the command line."""
    words = list(argv)
    while words:
        word = words.pop(0)
        name, given, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            errors.append(f"{word!r} is no setting: settings look like --filter.tau=4")
            continue
        if not given:
            value = words.pop(0) if words and not words[0].startswith("--") else ""
        of_section = name in _SECTIONS and value.lstrip().startswith("{")  # --train={samples: 8}
        if name != "config" and not of_section:
            yield name, value, ""
            continue
        try:
            content = yaml.safe_load(value if value.lstrip().startswith("{") else Path(value).read_text())
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            errors.append(f"--{name} {value}: {' '.join(str(error).split())}")
            continue
        if not isinstance(content, dict):
            errors.append(f"--{name} {value}: expected settings, found {type(content).__name__}")
            continue
        for leaf, setting in _leaves(content, f"{name}." if of_section else ""):
            yield leaf, setting, "" if of_section else f"{value}: "


def _leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
