"""Agents on disk: safetensors and JSON only, written beside and then renamed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from .agent import Agent

    AgentT = TypeVar("AgentT", bound=Agent)

MANIFEST = "agent.json"


def write_json(file: Path, content: Any) -> None:
    """Writes JSON beside and then renames it: the file is there whole or as it was."""
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.replace(file)


@contextmanager
def whole_folder(folder: Path, mark: str) -> Iterator[Path]:
    """A new folder to write into, renamed to `folder` at the end; what stood there before is replaced.

    Args:
        folder: where the result goes.
        mark: a file that must be in an old folder for it to be replaced.

    Raises:
        ValueError: where `folder` holds files but not the mark.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / mark).exists())):
        raise ValueError(f"folder must be empty, new, or hold {mark}; {str(folder)!r} holds something else")
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        part.chmod(0o755)
        yield part
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def save_agent(agent: Agent, folder: Path) -> None:
    """Writes an agent into `folder`, whole or not at all; what stood there before is replaced.

    The policy and its tokenizer lie at the top, so `AutoModelForCausalLM.from_pretrained(folder)` works; every other
    module has a folder of its own (a `PreTrainedModel`) or a safetensors file.
    """
    with whole_folder(folder, MANIFEST) as part:
        for name, module in agent.modules.items():
            if isinstance(module, PreTrainedModel):
                module.save_pretrained(part if name == "policy" else part / name)
            else:
                save_file(module.state_dict(), part / f"{name}.safetensors")
        agent.tokenizer.save_pretrained(part)
        settings = {**dataclasses.asdict(agent.config), "learning_rate": agent.learning_rate}
        manifest = {
            "agent": type(agent).__name__,
            "config": settings,
            "num_timesteps": agent.num_timesteps,
            "num_updates": agent.num_updates,
            "kl_coef": agent.base.kl_coef,
        }
        write_json(part / MANIFEST, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `agent.json` in a folder says.

    Raises:
        ValueError: where there is none, or it cannot be read.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"folder must hold a saved agent ({MANIFEST}); {str(folder)!r} does not ({error})") from None
    return manifest


def load_agent(cls: type[AgentT], folder: Path, env: Any, settings: Mapping[str, Any]) -> AgentT:
    """Makes the agent that `save_agent` wrote.

    Raises:
        ValueError: for a folder without an agent, or with one of another class.
    """
    manifest = read_manifest(folder)
    if manifest["agent"] != cls.__name__:
        raise ValueError(f"folder {str(folder)!r} holds a {manifest['agent']}, not a {cls.__name__}")
    agent = cls(env, str(folder), **{**manifest["config"], **settings})
    agent.num_timesteps, agent.num_updates = manifest["num_timesteps"], manifest["num_updates"]
    agent.base.kl_coef = manifest["kl_coef"]
    for name, module in agent.modules.items():
        if name == "policy":
            continue
        if isinstance(module, PreTrainedModel):
            module.load_state_dict(load_file(folder / name / "model.safetensors"), strict=False)
        else:
            module.load_state_dict(load_file(folder / f"{name}.safetensors"))
    return agent
