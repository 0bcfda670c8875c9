"""Finds the agent that `MODULE:ATTRIBUTE` names, and says precisely what is wrong where there is none."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from types import ModuleType
from typing import Any

from orki_agent.agent import Agent
from orki_contract.errors import InvalidSetting, OrkiError

__all__ = ["load_agent"]


def load_agent(target: str) -> Agent:
    """The agent at `MODULE:ATTRIBUTE`; the current folder is looked at first, as with `python -m`.

    Raises:
        InvalidSetting: It is not of that form, the module cannot be imported, or its attribute is missing or no agent.
    """
    name, colon, attribute = target.partition(":")
    if not colon or not name or not attribute:
        raise InvalidSetting(f"{target!r} is not MODULE:ATTRIBUTE, such as review.agent:agent")
    module = _import(name, target)
    try:
        found: Any = module
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise InvalidSetting(
            f"{target}: module {name} ({_file(module)}) has no {attribute}; {_agents(module)}"
        ) from None
    if isinstance(found, Agent):
        return found
    place = _defined(found) or _file(module)
    hint = "give the attribute that holds the Agent(...), not what makes it" if callable(found) else _agents(module)
    raise InvalidSetting(f"{target} is {_article(found)}, no orki_agent.Agent ({place}); {hint}")


def _import(name: str, target: str) -> ModuleType:
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise InvalidSetting(
                f"{target}: there is no module {error.name}; run this where it can be imported, or set PYTHONPATH"
            ) from None
        raise InvalidSetting(f"{target}: {_last_place(error)}: {error}; install what it needs") from error
    except OrkiError as error:
        raise InvalidSetting(f"{target}: {_last_place(error)}: {error.message}") from error
    except Exception as error:
        raise InvalidSetting(
            f"{target}: importing {name} failed at {_last_place(error)}: {type(error).__name__}: {error}"
        ) from error


def _last_place(error: BaseException) -> str:
    """Where it was raised, as far as that is the user's code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "importlib" not in frame.filename and "/orki_" not in frame.filename]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else "its import"


def _agents(module: ModuleType) -> str:
    names = sorted(name for name, value in vars(module).items() if isinstance(value, Agent))
    if names:
        return "it has " + ", ".join(f"{module.__name__}:{name}" for name in names)
    return 'it has no agent; write agent = Agent("reviewer", Reviewer()) in it'


def _file(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or "a package without a file"


def _defined(found: object) -> str:
    try:
        return f"{inspect.getsourcefile(found)}:{inspect.getsourcelines(found)[1]}"  # type: ignore[arg-type]
    except (TypeError, OSError):
        return ""


def _article(found: object) -> str:
    kind = "class" if isinstance(found, type) else type(found).__name__
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"
