"""Functions bound to one instance so that copies and stored models have them too.

A bound method is stored as its name on its object, which gives the class's own method, or none, when it is loaded. A
`functools.partial` is stored as the function and the object.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def bind(owner: Any, function: Callable[..., Any]) -> None:
    """Let ``owner.NAME(...)`` be ``function(owner, ...)``, NAME being the function's; on this instance alone.

    Args:
        owner: any object with a ``__dict__``.
        function: one that its module has by its name, as what is stored must be.
    """
    method = partial(function, owner)
    method.__doc__ = function.__doc__
    vars(owner)[function.__name__] = method


def in_place_of(owner: Any, name: str, function: Callable[..., Any], *settings: Any) -> partial[Any]:
    """Let a method be ``function(owner, *settings, ...)``, with the signature that the class's own has.

    Args:
        owner: any object with a ``__dict__``.
        name: of the method.
        function: see `bind`.
        *settings: what the function takes between the object and the method's own arguments.

    Returns:
        What it is now; attributes may be set on it.
    """
    replaced = getattr(type(owner), name)
    method = partial(function, owner, *settings)
    # Of what functools.wraps would copy, annotations cannot always be stored. Loaded, this is the class's own again.
    vars(method).update(__name__=name, __doc__=replaced.__doc__, __wrapped__=MethodType(replaced, owner))
    vars(owner)[name] = method
    return method
