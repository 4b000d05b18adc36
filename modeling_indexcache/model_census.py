"""Whether a model is still what it was: the same modules, tensors in the same places, hooks and settings.

A recorded decoding step replays what it found. Weights changed in place are read anew at every replay; a weight, an
adapter or a hook that was exchanged must be noticed before another step counts. That is asked at every step, of a
thousand modules, so it is asked in two parts. Before the replay: is the memory that it reads still there? Weak
references answer that for nothing. While the device replays: is everything the same? Flat lists answer that in C, in
some 0.3 ms of a CPU for 47 layers, which nobody waits for.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from itertools import repeat
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _modules

from .attention.absorbed_weights import address_of, kept_of, settings_of, still_holds
from .parallel.module_hooks import is_own

# Classes whose settings do not change what a call without gradient computes, once they are made.
_SETTLED = ("torch.nn.", "transformers.activations")
_PLAIN = (torch.Tensor, nn.Parameter)


class NotCopied:
    """Belongs to the object that holds it: copies and pickles of that one get None in its place."""

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return type(None), ()


class ModelCensus(NotCopied):
    """What the children `names` of a model, and their parts, were made of when this was made.

    Holds none of their tensors, but the dicts that hold them. Belongs to the model for as long as recordings use it.

    Attributes:
        users: recordings that ask it.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.users = 0
        own = [(model._modules, name) for name in names]
        found = list(dict.fromkeys(part for held, name in own for part in held[name].modules()))  # type: ignore[union-attr]
        children = own + [(part._modules, name) for part in found for name in part._modules]
        entries = [(held, name) for part in found for held in (part._parameters, part._buffers) for name in held]
        tensors = [(held, name) for held, name in entries if held[name] is not None]
        nothing = [(held, name) for held, name in entries if held[name] is None]
        self._objects = _Lookups(children + nothing)
        self._tensors = _Lookups(tensors)
        self._places: list[Any] = [part._modules for part in found] + [part._parameters for part in found]
        self._hooks = [h for part in found for h in (part._forward_pre_hooks, part._forward_hooks)]
        self._hooks += [_modules._global_forward_pre_hooks, _modules._global_forward_hooks]
        self._attributes = [vars(part) for part in found]
        foreign = [p for p in found if not is_own(p) and not type(p).__module__.startswith(_SETTLED)]
        settings = [(vars(part), name) for part in foreign for name, _ in settings_of(part)]
        self._settings = _Lookups(settings)
        values = self._tensors.values()
        plain = all(type(tensor) in _PLAIN for tensor in values)
        self._address = torch.Tensor.data_ptr if plain else address_of
        # Recordings read what is kept of such modules, not the modules: changes in place count here.
        self._absorbed = [(part, kept) for part in found if (kept := kept_of(part)) is not None]
        self._freed: list[Any] = []
        self._alive = [weakref.ref(t.untyped_storage(), self._freed.append) for t in values if type(t) in _PLAIN]
        # Where PyTorch's storages do not outlive their Python objects, nobody is notified: then it is looked for.
        self._is_notified = not self._freed
        self._known = self._look()
        self._known_settings = copy.deepcopy(self._settings.values())

    def memory_is_there(self) -> bool:
        """Whether no tensor's memory was given back since; costs nothing."""
        return not self._freed if self._is_notified else self.unchanged()

    def unchanged(self) -> bool:
        """Whether a replay still computes what a call of the modules would."""
        try:
            return (
                self._look() == self._known
                and self._settings.values() == self._known_settings
                and all(still_holds(part, kept) for part, kept in self._absorbed)
            )
        except (KeyError, RuntimeError):
            # An entry is gone, or a setting became a tensor.
            return False

    def _look(self) -> tuple[Any, ...]:
        return (
            list(map(id, self._objects.values())),
            list(map(self._address, self._tensors.values())),
            list(map(len, self._places)),
            list(map(tuple, filter(None, self._hooks))),
            list(map(id, filter(None, map(dict.get, self._attributes, repeat("forward"))))),
        )


class _Lookups:
    """Entries of many dicts, read in one go."""

    def __init__(self, entries: list[tuple[dict[str, Any], str]]) -> None:
        self._dicts, self._names = [held for held, _ in entries], [name for _, name in entries]

    def values(self) -> list[Any]:
        """What the entries hold now.

        Raises:
            KeyError: when one is gone.
        """
        return list(map(_entry, self._dicts, self._names))


_entry = dict.__getitem__
