"""What a run is made of beside its models, as JSON and tensors: numbers, generators, positions, wherever they are kept.

Every attribute of an agent, an environment and its wrappers that is a number, a text, a tensor, an array, a generator
or a list, tuple, dict or deque of these is state; so is a `Rollout`, and whatever has `state_dict` and
`load_state_dict`. Everything else (models, tasks, functions, spaces) is made anew by the code that makes the agent.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import random
from collections import deque
from collections.abc import Collection, Iterator
from typing import Any, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np
import torch
from gymnasium.wrappers.utils import RunningMeanStd
from numpy.typing import NDArray
from torch import Tensor, nn

from .batch import Rollout
from .offline import Epochs
from .outcomes import Outcomes
from .pairs import AskedOnce, HeldOut
from .penalty import Penalty
from .score_weight import ScoreWeight
from .streams import RowStream, RowStreams
from .task import Task
from .texts import Texts

PARTS = (AskedOnce, Epochs, HeldOut, Outcomes, RowStream, RowStreams, RunningMeanStd, ScoreWeight, Texts)
"""Objects that are packed attribute by attribute, and restored into those that stand in their place; without those
that their class calls `not_saved`, which come from the task."""
Tensors = dict[str, Tensor]


@runtime_checkable
class Stateful(Protocol):
    """PyTorch's way to say what is state."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Puts it back."""


class NotState(TypeError):
    """A value that cannot be kept as JSON and tensors."""


def pack(value: Any, tensors: Tensors) -> Any:
    """A value as JSON; its tensors go into `tensors`, under numbers.

    Raises:
        NotState: for what is no state.
    """
    plain = (bool, int, float, str)
    if value is None or (isinstance(value, plain) and not isinstance(value, np.generic)):  # np.float64 is a float too
        return value
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and not isinstance(value, nn.Parameter):
        return _pack_array(value, tensors)
    if isinstance(value, (np.random.Generator, torch.Generator, random.Random)):
        return {"generator": pack(_generator_state(value), tensors)}
    if isinstance(value, (list, tuple, deque)):
        kind = next(each.__name__ for each in (list, tuple, deque) if isinstance(value, each))
        out: dict[str, Any] = {kind: [pack(each, tensors) for each in value]}
        if isinstance(value, deque):
            out["maxlen"] = value.maxlen
        return out
    if isinstance(value, dict):
        return {"dict": [[pack(key, tensors), pack(each, tensors)] for key, each in value.items()]}
    return _pack_object(value, tensors)


def _pack_object(value: Any, tensors: Tensors) -> Any:
    if isinstance(value, Rollout):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"rollout": pack(fields, tensors)}
    if isinstance(value, PARTS):
        return {"part": pack_attributes(value, tensors, getattr(type(value), "not_saved", ()))}
    if isinstance(value, gym.Space):
        return {"space": pack(value._np_random, tensors)}
    if isinstance(value, Stateful):
        return {"state": pack(dict(value.state_dict()), tensors)}
    raise NotState(type(value).__name__)


def _pack_array(value: Any, tensors: Tensors) -> Any:
    if isinstance(value, Tensor):
        key, array = "tensor", value.detach()
    elif value.dtype == object:
        return {"objects": pack(value.tolist(), tensors)}
    else:
        key, array = "array", torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape))
    name = str(len(tensors))
    tensors[name] = array.to("cpu", copy=True).contiguous()
    out = {key: name}
    return {**out, "cpu": value.device.type == "cpu"} if isinstance(value, Tensor) else out


def _generator_state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.getstate() if isinstance(generator, random.Random) else generator.bit_generator.state


def unpack(value: Any, tensors: Tensors, device: torch.device, current: Any = None) -> Any:
    """What `pack` was given.

    Args:
        value: what it gave.
        tensors: likewise.
        device: where tensors go that were not on the CPU.
        current: what stands in its place now: generators and objects are changed, not replaced, since others may hold
            them too.
    """
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    if kind in ("list", "tuple", "deque", "dict", "objects"):
        return _unpack_container(value, tensors, device, current)
    if kind == "tensor":
        return tensors[content] if value["cpu"] else tensors[content].to(device)
    if kind == "array":
        array = tensors[content].numpy()
        return array.copy() if array.ndim else array[()]
    if kind == "generator":
        return _set_generator(unpack(content, tensors, device), current)
    if kind == "rollout":
        return Rollout(**unpack(content, tensors, device))
    if kind == "space":
        current._np_random = unpack(content, tensors, device, current._np_random)
    elif kind == "part" and current is not None:  # an agent loaded without it, as with kl_target=None, has no place
        unpack_attributes(current, content, tensors, device)
    elif kind == "state":
        current.load_state_dict(unpack(content, tensors, device))
    return current


def _unpack_container(value: dict[str, Any], tensors: Tensors, device: torch.device, current: Any) -> Any:
    kind, content = next(iter(value.items()))
    if kind == "dict":
        here = copy.copy(current) if isinstance(current, dict) else {}  # never the old one: it may be a task's row
        pairs = [(unpack(key, tensors, device), each) for key, each in content]
        found = {key: unpack(each, tensors, device, here.get(key)) for key, each in pairs}
        here.clear()  # of the kind it was, which may give values to missing keys
        here.update(found)
        return here
    if kind == "objects":
        items = unpack(content, tensors, device)
        out = np.empty(len(items), dtype=object)
        out[:] = items
        return out
    same = isinstance(current, (list, tuple, deque)) and len(current) == len(content)
    places = list(current) if same else [None] * len(content)
    items = [unpack(each, tensors, device, place) for each, place in zip(content, places, strict=True)]
    return deque(items, value["maxlen"]) if kind == "deque" else tuple(items) if kind == "tuple" else items


def _set_generator(state: Any, current: Any) -> Any:
    if isinstance(state, Tensor):
        current = current if isinstance(current, torch.Generator) else torch.Generator()
        return current.set_state(state)
    if isinstance(state, tuple):
        current = current if isinstance(current, random.Random) else random.Random()
        current.setstate(state)
        return current
    if not isinstance(current, np.random.Generator):
        current = np.random.Generator(getattr(np.random, state["bit_generator"])())
    current.bit_generator.state = state
    return current


def pack_attributes(thing: Any, tensors: Tensors, skip: Collection[str] = ()) -> dict[str, Any]:
    """The attributes of an object that are state, without those called as `skip` says."""
    out = {}
    for name, value in vars(thing).items():
        if name in skip:
            continue
        before = len(tensors)
        try:
            out[name] = pack(value, tensors)
        except NotState:
            for each in list(tensors)[before:]:
                del tensors[each]
    return out


def unpack_attributes(thing: Any, state: dict[str, Any], tensors: Tensors, device: torch.device) -> None:
    """Puts back what `pack_attributes` took; an environment's arrays, which are views of each other, in place."""
    in_place = isinstance(thing, (gym.Env, gym.vector.VectorEnv))
    for name, content in state.items():
        current = getattr(thing, name, None)
        value = unpack(content, tensors, device, current)
        if isinstance(current, PARTS) and not isinstance(value, PARTS):
            continue  # of a version that kept a number there
        if in_place and isinstance(current, np.ndarray) and isinstance(value, np.ndarray) and fits(current, value):
            current[...] = value
        else:
            setattr(thing, name, value)


def fits(array: NDArray[Any], other: NDArray[Any]) -> bool:
    """Whether one array can take the other in without a change."""
    return array.shape == other.shape and array.dtype == other.dtype


# ---- environments ------------------------------------------------------------------------------------------------


def layers(env: Any) -> Iterator[Any]:
    """An environment's wrappers from the outside in, then what they wrap; the tasks stand last."""
    yield env
    inner = [*vars(env).get("envs", ()), *([vars(env)["env"]] if "env" in vars(env) else [])]
    for each in inner:
        yield from layers(each)
    if isinstance(task := vars(env).get("task"), Task) and not inner:
        yield task


FORM = (
    "num_envs",
    "autoreset_mode",
    "max_episode_steps",
    "_max_episode_steps",
    "temperature",
    "max_prompt_tokens",
    "max_new_tokens",
)
"""What must be alike in two environments for the state of one to fit the other, beside their kinds."""


def form(env: Any) -> list[str]:
    """What an environment is made of, layer by layer: another of the same form can be put in its place."""
    out = []
    for layer in layers(env):
        own = {**vars(layer), **{name: getattr(layer, name) for name in FORM[-2:] if isinstance(layer, Task)}}
        told = [f"{name}={own[name]}" for name in FORM if name in own]
        told += ["reference"] if own.get("reference") is not None else []
        out.append(" ".join([type(layer).__name__, *told]))
    return out


def born(env: Any) -> str:
    """By which two environments are told apart before anything was done in them: kinds, settings and the first rows."""
    told: list[Any] = []
    for layer in layers(env):
        plain = {k: v for k, v in vars(layer).items() if v is None or isinstance(v, (bool, int, float, str))}
        told.append((type(layer).__name__, sorted(plain.items())))
        if isinstance(layer, Task) and layer.rows is not None:
            told.append((len(layer.rows), layer.rows[:1000]))
    return hashlib.sha256(repr(told).encode()).hexdigest()


def pack_env(env: Any, tensors: Tensors) -> list[dict[str, Any]]:
    """The generators, the running episodes and the statistics of an environment and of all that wraps it.

    Of a task only numbers, texts and generators: its lists are its data.
    """
    out = []
    for layer in layers(env):
        data = (list, tuple, dict, deque, Tensor, np.ndarray, nn.Module) if isinstance(layer, Task) else (nn.Module,)
        skip = {name for name, value in vars(layer).items() if isinstance(value, data) or name == "envs"}
        out.append(pack_attributes(layer, tensors, skip))
    return out


def unpack_env(env: Any, state: list[dict[str, Any]], tensors: Tensors, device: torch.device) -> None:
    """Puts back what `pack_env` took from an environment of the same form."""
    here = list(layers(env))
    if any(each.get(name) for each in state for name in ("_stream", "_streams")):  # made by the first reset
        env.reset()
    for layer, content in zip(here, state, strict=True):
        unpack_attributes(layer, content, tensors, device)


def forget_caches(env: Any) -> None:
    """Drops what the reference models in an environment remember of the episodes so far.

    Texts read again are the same to the last bit in a run that was interrupted and in one that was not.
    """
    for layer in layers(env):
        if isinstance(penalty := vars(layer).get("penalty"), Penalty):
            penalty.stepper.forget()


# ---- generators that belong to nobody ------------------------------------------------------------------------------


def pack_generators(tensors: Tensors) -> Any:
    """The global generators of Python, NumPy and torch, which a score may draw from."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return pack(state, tensors)


def unpack_generators(state: Any, tensors: Tensors) -> None:
    """Puts them back."""
    found = unpack(state, tensors, torch.device("cpu"))
    random.setstate(found["python"])
    np.random.set_state(found["numpy"])
    torch.set_rng_state(found["torch"])
    if "cuda" in found and torch.cuda.is_available():
        torch.cuda.set_rng_state(found["cuda"])
