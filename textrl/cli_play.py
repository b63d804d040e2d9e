"""`textrl play`: a person writes the response, and sees what policy, reference and critic make of it.

Commands are read line by line from the standard input, so that it works in a terminal and over a pipe.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import gymnasium as gym

from .cli_flags import given_penalty, own_tokenizer, parse_env_args
from .codec import plain_ids
from .config import check
from .plugins import check_env_id, nearest
from .render import token_texts
from .runs import FINAL
from .trained import finished_run, trained_agent

if TYPE_CHECKING:
    from .agent import Agent
    from .env import Snapshot, TextEnv

HELP = """\
TEXT         write it, token by token (/say TEXT for one that begins with # or /)
#3  #r3      the third token of the policy's list, of the reference's (!: the task advises against it)
/token ID    the token with this id
/end         the end token
/go [N]      the policy draws N tokens (default 1; /go all: to the end)
/back [N]    take N tokens back (default 1)
/restart     the same prompt once more
/new         another prompt
/help        this list
/quit        leave; so does the end of input"""


def play_parser(commands: Any) -> None:
    """Adds `textrl play` to the commands."""
    play = commands.add_parser("play", help="write the responses yourself, and see what a policy would do")
    play.add_argument("env", metavar="ENV", nargs="?", help="see textrl envs (default: that of --run)")
    play.add_argument(
        "--env-arg", action="append", default=[], metavar="NAME=VALUE", help="argument of the environment, JSON or text"
    )
    play.add_argument("--run", metavar="RUN", dest="folder", help="the --log-dir of a run, whose agent is the policy")
    play.add_argument("--model", help="folder or hub name of the policy (default: a small random one)")
    play.add_argument("--reference", help="folder or hub name of the frozen reference")
    play.add_argument(
        "--kl-coef", type=float, help="weight of the KL penalty (default: the run's or the environment's)"
    )
    play.add_argument("--seed", type=int, default=0, help="of prompts and samples (default: %(default)s)")
    play.add_argument("--save", metavar="FILE", help="a new .jsonl file for the finished episodes")
    play.set_defaults(run=play_episodes)


def play_episodes(options: argparse.Namespace) -> None:
    """Makes the environment and the policy, and plays until the input ends."""
    save = None if options.save is None else Path(options.save)
    check("--save", options.save, save is None or save.suffix == ".jsonl", "a file whose name ends in .jsonl")
    check("--save", options.save, save is None or not save.exists(), "a new file; this one exists")
    check("--save", options.save, save is None or save.parent.is_dir(), "in a folder that exists")
    env, agent = stage(options)
    session = Session(env, agent, save, options.seed)
    try:
        session.run(typed_lines(sys.stdin))
    finally:
        session.settle()
        session.board.say(f"episodes {f'saved to {save}' if save else 'finished'}: {session.saved}")


def stage(options: argparse.Namespace) -> tuple[TextEnv, Agent]:
    """The environment to play in, with the policy and its values attached, and the agent that has them."""
    from .agent import Agent
    from .critic import state_values

    check("--model", options.model, options.model is None or options.folder is None, "left out with --run")
    run = None if options.folder is None else finished_run("--run", Path(options.folder))
    if options.env is None and run is None:
        raise ValueError("ENV is missing; textrl envs lists the environments")
    id = check_env_id(run["env"] if options.env is None and run is not None else options.env)
    same = run is not None and check_env_id(run["env"]) == id
    kwargs = {**(run["env_kwargs"] if run and same else {}), **parse_env_args(options.env_arg)}
    kwargs |= given_penalty(options) | own_tokenizer(id, kwargs, options.model)
    env: TextEnv = gym.make(id, render_mode="ansi", **kwargs).unwrapped  # type: ignore[assignment]
    if run is None:
        agent = Agent(env, options.model, seed=options.seed)
    else:
        agent = trained_agent(Path(options.folder) / FINAL, run, options.seed, critic=True)
        size = agent.task.vocab_size
        check("--run", options.folder, size == env.task.vocab_size, f"of an agent with {env.task.vocab_size} tokens")
    env.policy, env.value = agent.stepper, state_values(agent)
    return env, agent


def typed_lines(stream: TextIO) -> Iterator[str]:
    """The lines of a stream, without line breaks; with editing and a prompt where it is a terminal."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    if not stream.isatty():
        yield from (line.rstrip("\r\n") for line in stream)
        return
    import readline  # noqa: F401  (`input` edits and remembers lines with it)

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


class Session:
    """Episodes played by hand.

    Args:
        env: with policy and value attached.
        agent: the policy.
        save: a file that every finished episode is added to, or None.
        seed: of the prompts.
    """

    def __init__(self, env: TextEnv, agent: Agent, save: Path | None, seed: int) -> None:
        from .board import Board

        self.env, self.agent, self.file, self.task = env, agent, save, env.task
        self.board = Board(env, agent)
        self.saved = 0
        self.final: dict[str, Any] | None = None
        """The info of the end, once the episode has ended."""
        self.before: list[Snapshot] = []
        """The episode before each of its tokens."""
        self.observation, _ = env.reset(seed=seed)

    def show(self) -> None:
        """The episode as it stands."""
        if self.final is None:
            self.board.state(self.observation)
        else:
            self.board.end(self.final)

    def run(self, lines: Iterator[str]) -> None:
        """Does what the lines say, until /quit or their end."""
        self.board.say(f"{type(self.task).__name__}: write the response; /help lists the commands")
        self.show()
        for line in lines:
            if line.strip() == "/quit":
                return
            try:
                if self.do(line):
                    self.show()
            except ValueError as error:
                self.board.say(" ".join(str(error).split()))

    # ---- what is typed ---------------------------------------------------------------------------------------

    def do(self, line: str) -> bool:
        """Does what one line says; returns whether there is something new to see.

        Raises:
            ValueError: for what cannot be done, saying what could.
        """
        if line.startswith("#"):
            self.take(self.board.listed(line[1:].strip()))
        elif line.startswith("/"):
            name, _, argument = line[1:].partition(" ")
            commands: dict[str, Callable[[str], None]] = {
                "say": self.write, "token": self.token, "end": self.end,
                "go": self.go, "back": self.back, "restart": self.restart, "new": self.new,
            }  # fmt: skip
            if name == "help":
                self.board.say(HELP)
                return False
            if name not in commands:
                raise ValueError(f"unknown command {'/' + name!r}; {nearest(name, [*commands, 'help', 'quit'])}")
            commands[name](argument)
        elif line:
            self.write(line)
        return True

    def take(self, token: int) -> None:
        """Appends a token."""
        if self.final is not None:
            raise ValueError("the episode has ended: /new, /restart or /back")
        here = self.env.snapshot()
        try:
            self.observation, _, ended, _, info = self.env.step(token)
        except Exception:  # whatever a score may raise: the token is not taken
            self.env.restore(here)
            raise
        self.before.append(here)
        self.final = info if ended else None

    def token(self, argument: str) -> None:
        """Appends the token with an id."""
        right = f"an id from 0 to {self.task.vocab_size - 1}"
        check("/token", argument, argument.isdecimal() and int(argument) < self.task.vocab_size, right)
        self.take(int(argument))

    def end(self, _: str = "") -> None:
        """Appends the end token."""
        self.take(self.task.eos_token_id)

    def write(self, text: str) -> None:
        """Appends the tokens of a text, as far as there is room."""
        for token in self.tokens_of(text):
            if self.final is not None:
                self.board.say("the rest of the text did not fit")
                return
            self.take(token)

    def tokens_of(self, text: str) -> list[int]:
        """The token ids of a typed text: as the tokenizer has it, or the one token that it is but for spaces."""
        if self.final is not None:
            raise ValueError("the episode has ended: /new, /restart or /back")
        try:
            ids = plain_ids(self.task.tokenizer, text, "text")
        except ValueError:
            ids = []
        if not ids:
            pieces = token_texts(self.task, range(self.task.vocab_size)) if self.task.vocab_size <= 1000 else []
            ids = [i for i, piece in enumerate(pieces) if piece.strip() == text.strip() and text][:1]
        check("text", text, bool(ids), "made of the tokenizer's tokens (#N picks one of the list)")
        return ids

    def go(self, argument: str) -> None:
        """Lets the policy draw tokens."""
        from .attaching import actor

        check("/go", argument, argument in ("", "all") or argument.isdecimal(), "a number of tokens, or all")
        count = self.task.max_new_tokens if argument == "all" else int(argument or 1)
        agent = self.agent
        act = actor(self.env, agent.stepper, self.env.temperature, agent.generator, agent.own_masks)
        for _ in range(count):
            self.take(int(act(self.observation[None])[0][0]))
            if self.final is not None:
                return

    def back(self, argument: str) -> None:
        """Takes tokens back."""
        most = len(self.before)
        if not most:
            raise ValueError("there is no token to take back")
        fine = (argument or "1").isdecimal() and 1 <= int(argument or 1) <= most
        check("/back", argument, fine, f"a number from 1 to {most}")
        self.before, here = self.before[: most - int(argument or 1)], self.before[most - int(argument or 1)]
        self.observation, self.final = self.env.restore(here), None

    def restart(self, _: str = "") -> None:
        """The same prompt once more."""
        self.settle()
        if self.before:
            self.observation, self.final = self.env.restore(self.before[0]), None
        self.before = []

    def new(self, _: str = "") -> None:
        """Another prompt."""
        self.settle()
        self.observation, _info = self.env.reset()
        self.before, self.final = [], None

    # ---- what is kept ----------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Saves the episode if it has ended: what was taken back before that is gone."""
        if self.final is None:
            return
        here = self.env.snapshot()
        row = {
            **here.row,
            "completion": self.final["completion"],
            "completion_ids": here.tokens[here.prompt_length : here.length].tolist(),
            "score": float(self.final["score"]),
            "rewards": list(here.rewards),
        }
        self.final, self.saved = None, self.saved + 1
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, default=str) + "\n")
