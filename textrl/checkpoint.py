"""Agents on disk: safetensors and JSON only, written beside and then renamed, checked before they are used."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import state
from .adapters import BASE, has_adapter, load_adapter_weights, own_weights, save_adapter
from .config import check
from .critic import Critic
from .folders import verify, whole_folder, write_manifest

if TYPE_CHECKING:
    from .agent import Agent

    AgentT = TypeVar("AgentT", bound=Agent)

STATE, TENSORS = "state.json", "state.safetensors"
BOUND = "max_tokens_per_microbatch"
"""A setting that a run may lower by itself, and that may be another on another machine."""


# ---- modules and state ---------------------------------------------------------------------------------------------


def save_module(module: nn.Module, folder: Path, name: str) -> None:
    """Writes a `PreTrainedModel` into a folder of that name ("": `folder` itself), another module into one file."""
    if isinstance(module, PreTrainedModel):
        module.save_pretrained(folder / name)
    else:
        save_file(module.state_dict(), folder / f"{name}.safetensors")


def load_module(module: nn.Module, folder: Path, name: str) -> None:
    """Puts the weights that `save_module` wrote into a module of the same form."""
    whole = isinstance(module, PreTrainedModel)  # a large one is written in several files, what is tied once
    where = folder / (name if whole else f"{name}.safetensors")
    if not where.exists():
        raise ValueError(
            f"folder {str(folder)!r} holds no {name}: make the agent with the settings that it was saved with"
        )
    files = [*where.glob("model.safetensors"), *where.glob("model-*-of-*.safetensors")] if whole else [where]
    put_back(module, {key: weight for file in files for key, weight in load_file(file).items()}, where)


def load_own_weights(module: nn.Module, file: Path, policy: nn.Module) -> None:
    """Puts back what `own_weights` gave; of what the policy holds too, the module has a copy of its own from now on."""
    weights, held = load_file(file), {parameter.data_ptr() for parameter in policy.parameters()}
    for name, parameter in list(module.named_parameters()):
        if name in weights and parameter.data_ptr() in held:
            owner, _, leaf = name.rpartition(".")
            copied = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            setattr(module.get_submodule(owner), leaf, copied)
    put_back(module, weights, file)


def put_back(module: nn.Module, weights: Mapping[str, Tensor], where: Path) -> None:
    """Loads weights into a module that may hold others of its own, tied or shared.

    Raises:
        ValueError: where they are those of another model.
    """
    try:
        wrong = module.load_state_dict(weights, strict=False).unexpected_keys
    except RuntimeError as error:  # a line for each weight of another shape, below one that says so
        wrong = [line.strip() for line in str(error).splitlines()[1:]]
    if wrong or not weights:
        raise ValueError(f"{str(where)!r} holds the weights of another model ({', '.join(wrong[:1]) or 'none'})")


def save_state(folder: Path, content: Any, tensors: state.Tensors) -> None:
    """Writes what `state.pack` gave."""
    save_file(tensors, folder / TENSORS)
    (folder / STATE).write_text(json.dumps(content) + "\n", encoding="utf-8")


def load_state(folder: Path) -> tuple[Any, state.Tensors]:
    """What `save_state` wrote."""
    return json.loads((folder / STATE).read_text(encoding="utf-8")), load_file(folder / TENSORS)


# ---- agents --------------------------------------------------------------------------------------------------------


def save_agent(agent: Agent, folder: Path) -> None:
    """Writes an agent into `folder`, whole or not at all; what stood there before is replaced.

    The policy and its tokenizer lie at the top, so `AutoModelForCausalLM.from_pretrained(folder)` works; of a policy
    with an adapter that is peft's files, and `base` where the base model is not on disk already. Every other module has
    a folder of its own (a `PreTrainedModel`) or a safetensors file. `state.json` and `state.safetensors`
    hold what learning needs to go on: the optimizer, the generators, the positions.
    """
    with whole_folder(folder) as part:
        for name, module in agent.modules.items():
            taken = name in ("state", "model", "adapter_model", BASE) or name.startswith("model-")
            check("modules", name, not taken, "modules under other names than those of the policy's files")
            if name == "policy" and not has_adapter(module):
                with _end_token_told(agent.model, agent.task.eos_token_id):
                    save_module(module, part, "")
            elif not has_adapter(module):
                save_module(module, part, name)
            elif name == "policy":
                save_adapter(agent.model, part, folder)
            else:
                save_file(own_weights(module, agent.model), part / f"{name}.safetensors")
        agent.tokenizer.save_pretrained(part)
        for name, tokenizer in agent.tokenizers.items():
            if (part / name).is_dir():
                tokenizer.save_pretrained(part / name)
        tensors: state.Tensors = {}
        content = {
            "agent": state.pack_attributes(agent, tensors, skipped(agent)),
            "env": state.pack_env(agent.env, tensors),
            "form": state.form(agent.env),
            "generators": state.pack_generators(tensors),
        }
        save_state(part, content, tensors)
        facts = {
            "agent": type(agent).__name__,
            "config": _settings(agent),
            "num_timesteps": agent.num_timesteps,
            "num_updates": agent.num_updates,
            "kl_coef": agent.base.kl_coef,
            "tokenizers": sorted(agent.tokenizers),
            "dataset": agent.dataset_digest,
        }
        write_manifest(part, facts)


@contextmanager
def _end_token_told(model: PreTrainedModel, end: int) -> Iterator[None]:
    """The end token in a model's settings, by which transformers' `generate` stops, while they are written."""
    settings: list[Any] = [model.config, getattr(model, "generation_config", None)]
    told = [(each, each.eos_token_id) for each in settings if hasattr(each, "eos_token_id")]
    unaware = [(each, ends) for each, ends in told if end not in (ends if isinstance(ends, list) else [ends])]
    for each, _ in unaware:
        each.eos_token_id = end
    try:
        yield
    finally:
        for each, ends in unaware:
            each.eos_token_id = ends


def skipped(agent: Agent) -> set[str]:
    """Attributes of an agent that are saved in another way, or made anew from its arguments."""
    modules = [name for name, value in vars(agent).items() if isinstance(value, nn.Module)]
    saved = [name for name in modules if any(getattr(agent, name) is module for module in agent.modules.values())]
    return {"modules", *saved, *(name for each in type(agent).__mro__ for name in vars(each).get("not_saved", ()))}


def restore(agent: Agent, folder: Path) -> None:
    """Brings an agent to where the one was that `save_agent` wrote, which was made in the same way.

    Raises:
        CheckpointError: for a folder that is damaged or holds no agent.
        ValueError: for an agent of another class or with other settings.
    """
    _restore(agent, folder, manifest_of(type(agent), folder), new_settings=False)


def manifest_of(cls: type[Agent], folder: Path) -> dict[str, Any]:
    """The manifest of a folder that holds a whole agent of this class.

    Raises:
        CheckpointError: for a folder that is damaged or holds no agent.
        ValueError: for an agent of another class.
    """
    manifest = verify(folder)
    if manifest["agent"] != cls.__name__:
        raise ValueError(f"folder {str(folder)!r} holds a {manifest['agent']}, not a {cls.__name__}")
    return manifest


def _settings(agent: Agent) -> dict[str, Any]:
    """The settings in force, as JSON holds them."""
    settings = {**dataclasses.asdict(agent.config), "learning_rate": agent.learning_rate}
    return json.loads(json.dumps(settings))


def _restore(agent: Agent, folder: Path, manifest: Mapping[str, Any], new_settings: bool) -> None:
    settings = _settings(agent)
    differing = sorted(name for name, value in settings.items() if manifest["config"].get(name) != value)
    others = [name for name in differing if name != BOUND]
    others += ["dataset"] if manifest.get("dataset", agent.dataset_digest) != agent.dataset_digest else []
    if others and not new_settings:
        raise ValueError(f"folder {str(folder)!r} holds an agent with another {', '.join(others)}")
    _load_modules(agent, folder, manifest)
    content, tensors = load_state(folder)
    if {"trainable_layers", "dtype"} & set(differing):
        content["agent"].pop("optimizer", None)
    is_now, born = state.form(agent.env), agent.env_born
    was = content.get("form", is_now)
    if was != is_now and not new_settings:
        raise ValueError(f"env must be made as it was, {was}, for a run to go on; got {is_now}")
    state.unpack_attributes(agent, content["agent"], tensors, agent.device)
    if not new_settings or agent.env_born == born:  # else what is given is another environment, and stays as it is
        state.unpack_env(agent.env, content["env"], tensors, agent.device)
    else:
        agent.seeded, agent.env_born = False, born
    follows = all(config.get("kl_target") is not None for config in (manifest["config"], settings))
    if follows or not new_settings:
        agent.base.kl_coef = manifest["kl_coef"]
    if agent.halved:
        agent.config = dataclasses.replace(agent.config, **{BOUND: manifest["config"][BOUND]})
    agent.anneal(agent.schedule)
    agent.resumed = Resumed(content["generators"], tensors)


def _load_modules(agent: Agent, folder: Path, manifest: Mapping[str, Any]) -> None:
    for name in manifest.get("tokenizers", ()):
        if name not in agent.tokenizers:
            raise ValueError(
                f"folder {str(folder)!r} holds an agent whose {name} has a tokenizer of its own: give {name}="
            )
    for name, module in agent.modules.items():
        if not has_adapter(module):
            load_module(module, folder, "" if name == "policy" else name)
        elif name == "policy":
            load_adapter_weights(agent.model, folder)
        else:
            try:
                load_own_weights(module, folder / f"{name}.safetensors", agent.model)
            except ValueError as error:
                more = "" if name != "critic" else "; if it started from a reward model, give it again as critic="
                raise ValueError(f"{error}{more}") from None
    if isinstance(value := getattr(agent, "value", None), Critic):
        value.compare()


@dataclasses.dataclass(frozen=True)
class Resumed:
    """What a restored agent takes up only when it goes on learning: the generators that belong to nobody."""

    generators: Any
    tensors: state.Tensors

    def take_up(self) -> None:
        """Puts the global generators where they were."""
        state.unpack_generators(self.generators, self.tensors)


def load_agent(cls: type[AgentT], folder: Path, env: Any, settings: Mapping[str, Any]) -> AgentT:
    """Makes the agent that `save_agent` wrote.

    Raises:
        CheckpointError: for a folder that is damaged or holds no agent.
        ValueError: for an agent of another class.
    """
    manifest = manifest_of(cls, folder)
    agent = cls(env, str(folder), **{**manifest["config"], **cls.saved_arguments(folder), **settings})
    _restore(agent, folder, manifest, new_settings=True)
    return agent
