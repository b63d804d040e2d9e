"""`textrl play`, driven over a pipe: what is typed, what is shown, what is kept."""

import io
import json
import re
import subprocess
import sys

import pytest
import torch

import textrl
from textrl import cli
from textrl.agents import NLPO, PPO
from textrl.cli_play import Session
from textrl.envs.copy import Copy
from textrl.envs.increasing import Increasing
from textrl.envs.text import Text
from textrl.envs.vowels import Vowels
from textrl.episodes import as_episodes
from textrl.files import read_rows
from textrl.models import small_model
from textrl.offline import given_rollout

SMALL = ["textrl/Copy-v0", "--env-arg", "symbols=ab", "--env-arg", "length=2"]  # end 0, a 1, b 2


@pytest.fixture
def play(capsys, monkeypatch):
    def run(*arguments, typed=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        code = cli.main(["play", *map(str, arguments)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "copy"
    flags = ["--total-timesteps", "300", "--batch-size", "16", "--quiet", "--log-dir", str(folder)]
    assert cli.main(["train", "ppo", "--env", SMALL[0], *SMALL[1:], *flags]) == 0
    return folder


def prompt_of(out):
    return re.search(r"^([ab]+) >> ", out, re.MULTILINE)[1]


def test_typed_tokens_end_an_episode_and_are_kept(play, tmp_path):
    file = tmp_path / "mine.jsonl"
    code, out, err = play(*SMALL, "--save", file, "--seed", 3, typed="a\nb\n/end\n/new\nab\n/token 2\n")
    assert (code, err) == (0, "")
    assert "token 1 of 3" in out
    assert "the end (stop): score" in out and f"episodes saved to {file}: 2" in out
    rows = read_rows(file).rows
    assert [row["completion_ids"] for row in rows] == [[1, 2, 0], [1, 2, 2]]
    task = Copy(symbols="ab", length=2)
    rollout = as_episodes(file, task, torch.device("cpu"))
    assert rollout.completions == ["ab", "abb"] and rollout.stopped.tolist() == [True, False]
    assert rollout.scores.tolist() == pytest.approx(task.evaluate(rows, [[1, 2, 0], [1, 2, 2]]).totals.tolist())
    assert [row["rewards"] for row in rows] == [[0, 0, row["score"]] for row in rows]


def test_an_empty_prompt_reads_back(play, tmp_path):
    file = tmp_path / "mine.jsonl"
    assert play("textrl/Vowels-v0", "--save", file, typed="aeaeae\n")[0] == 0
    assert as_episodes(file, Vowels(), torch.device("cpu")).scores.tolist() == [1.0]


@pytest.mark.parametrize(("env", "steps"), [("textrl/Vowels-v0", 6), ("textrl/Bandit-v0", 1)])
@pytest.mark.parametrize("agent", ["sft", "bpo"])
def test_saved_episodes_are_learned_from(env, steps, agent, play, tmp_path):
    """Their prompts are empty, and so is what was said where the end came at once."""
    file = tmp_path / "mine.jsonl"
    assert play(env, "--save", file, typed="/end\n/new\n" + "/token 1\n" * steps)[0] == 0
    rows = read_rows(file).rows
    assert [row["completion_ids"] for row in rows] == [[0], [1] * steps] and rows[0]["prompt"] == ""
    flags = ["--total-timesteps", "20", "--batch-size", "2", "--quiet", "--log-dir", str(tmp_path / "run")]
    assert cli.main(["train", agent, "--env", env, "--dataset", str(file), *flags]) == 0


def test_a_step_back_is_as_if_it_had_not_been(play, tmp_path):
    file = tmp_path / "mine.jsonl"
    _, straight, _ = play(*SMALL, typed="ba\n")
    _, winding, _ = play(*SMALL, typed="a\n/back\nbbb\n/back 2\na\n")
    assert winding.splitlines()[-7:-1] == straight.splitlines()[-7:-1]
    _, out, _ = play(*SMALL, "--save", file, typed="bbb\n/back\n/end\n/restart\n/end\n")
    assert [row["completion_ids"] for row in read_rows(file)] == [[2, 2, 0], [0]]  # what was taken back is gone
    assert len({row["prompt"] for row in read_rows(file)}) == 1 and out.count("token 1 of 3") == 2


def test_a_token_is_picked_from_the_list(play):
    _, out, _ = play(*SMALL, typed="#1\n#4\n#r1\n#x\n")
    listed = re.findall(r"^ *#1 +(\S+) +[\d.]+$", out, re.MULTILINE)
    taken = re.search(r" >> (\S+) ", out)
    assert taken and taken[1].startswith(listed[0])
    assert out.count("must be a place from 1 to 3 of a list") >= 1 and "of a list that is shown; got 'r1'" in out
    shares = [float(x) for x in re.findall(r"#\d +\S+ +([\d.]+)$", out.split("token 1 of 3")[1].split(">>")[0], re.M)]
    assert len(shares) == 3 and sum(shares) == pytest.approx(1, abs=2e-3) and shares == sorted(shares, reverse=True)


def test_a_trained_run_shows_its_values_and_the_reference(play, trained):
    reference = ["--reference", trained / "final", "--kl-coef", 0.5]
    code, out, err = play("--run", trained, *reference, "--seed", 1, typed="a\n/go all\n")
    assert (code, err) == (0, "")
    assert re.search(r"# +policy +p +reference's p +# +reference +p +policy's p", out) and "shaded by value" in out
    agent = PPO.load(trained / "final", textrl.TextVectorEnv(Copy(symbols="ab", length=2), 1))
    prompt = prompt_of(out)
    batch = given_rollout(agent.task, [agent.task.encode({"prompt": prompt}).tolist()], [[1]], agent.device)
    value = float(agent.value(batch)[0, 0].detach())
    assert f"token 1 of 3, value {value:.3f}" in out
    assert re.search(r"KL to the reference -?0\.000", out)  # the policy is its own reference
    shares = re.findall(r"#\d +\S+ +([\d.]+) +([\d.]+) +#r", out)
    assert len(shares) >= 6 and all(mine == theirs for mine, theirs in shares)


def test_the_agent_draws_as_the_seed_says(play, trained, tmp_path):
    outs = [play(SMALL[0], "--run", trained, "--seed", 5, typed="/go all\n/new\n/go 2\n")[1] for _ in range(2)]
    assert outs[0] == outs[1]


def test_masks_are_shown_and_the_policy_keeps_them(play):
    _, out, _ = play("textrl/Brackets-v0", typed="/go all\n" + "/new\n/go all\n" * 5)
    assert re.search(r"#\d  <end> ! +0", out)
    scores = [float(score) for score in re.findall(r"score (\d(?:\.\d+)?)", out)]
    assert len(scores) == 6 and min(scores) > 0  # inside the masks all is balanced


def test_what_cannot_be_done_is_said_and_changes_nothing(play):
    typed = "abx\n/back\n/foo\n/token 9\n/token x\n/go x\n/en\n\n/end\n/end\na\n/quit\nnever read\n"
    code, out, err = play(*SMALL, typed=typed)
    assert (code, err) == (0, "")
    for said in (
        "text must be made of the tokenizer's tokens",
        "there is no token to take back",
        "unknown command '/foo'",
        "/token must be an id from 0 to 2; got '9'",
        "/token must be an id from 0 to 2; got 'x'",
        "/go must be a number of tokens, or all; got 'x'",
        "did you mean end",
    ):
        assert said in out
    assert out.count("the episode has ended") == 2 and "never" not in out
    assert "token 2 of 3" not in out and "episodes finished: 1" in out


def test_more_text_than_room(play):
    _, out, _ = play(*SMALL, typed="abab\n")
    assert "the rest of the text did not fit" in out and "the end (length)" in out


def test_a_token_is_found_without_its_spaces(play):
    _, out, _ = play("textrl/Increasing-v0", typed="3\n")
    assert ">> 3   [reward +0.200" in out and "token 2 of 5" in out
    assert Increasing().vocab_size == 6


@pytest.mark.parametrize("hostile", ["\x1b[2J", "\x9b31m", "\u202egnp", "a\rb\x07", "\x1b]0;title\x07"])
def test_hostile_text_moves_no_cursor(hostile, play, tmp_path):
    prompts, file = tmp_path / "prompts.jsonl", tmp_path / "mine.jsonl"
    tokens = sorted(set(hostile))
    textrl.symbol_tokenizer(tokens).save_pretrained(tmp_path / "tokenizer")
    prompts.write_text(json.dumps({"prompt": hostile}) + "\n")
    arguments = ["--env-arg", f"tokenizer={tmp_path / 'tokenizer'}", "--env-arg", f"prompts={prompts}"]
    typed = "#2\n#3\n/say " + hostile.replace("\r", "") + "\n/x" + hostile + "\n/end\n"
    code, out, err = play("textrl/Text-v0", *arguments, "--save", file, typed=typed)
    assert code == 0 and err == ""
    assert all(c.isprintable() or c == "\n" for c in out)
    assert Text(prompts=str(prompts), tokenizer=str(tmp_path / "tokenizer")).prompts()[0]["prompt"] == hostile
    assert read_rows(file).rows[0]["prompt"] == hostile


def test_the_process_ends_with_its_input(tmp_path):
    command = [sys.executable, "-m", "textrl.cli", "play", "textrl/Bandit-v0", "--save", str(tmp_path / "x.jsonl")]
    done = subprocess.run(command, input=b"c\n/new\n\xff\xfe", capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stderr == b""
    assert b"\x1b" not in done.stdout  # no colours into a pipe
    assert read_rows(tmp_path / "x.jsonl").rows[0]["score"] == 1.0


BAD = {
    "ENV is missing": [],
    "unknown env 'textrl/Copi-v0'": ["textrl/Copi-v0"],
    "--save must be a file whose name ends in .jsonl; got 'x.csv'": [*SMALL, "--save", "x.csv"],
    "--save must be in a folder that exists": [*SMALL, "--save", "absent/x.jsonl"],
    "--run must be the --log-dir of a textrl train": [*SMALL, "--run", "absent"],
    "--model must be left out with --run": [*SMALL, "--run", "absent", "--model", "x"],
    "kl_coef=0.1 needs a reference": [*SMALL, "--kl-coef", "0.1"],
    "model must be a folder that exists": [*SMALL, "--model", "no/such/folder"],
}


@pytest.mark.parametrize("message", BAD)
def test_what_the_user_got_wrong_is_one_line(message, play, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = play(*BAD[message])
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_exists_is_not_written_to(play, tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text("mine\n")
    code, _, err = play(*SMALL, "--save", file, typed="a\n/end\n")
    assert code == 2 and "a new file; this one exists" in err and file.read_text() == "mine\n"


def test_a_run_of_another_vocabulary_is_refused(play, trained):
    code, _, err = play("textrl/Bandit-v0", "--run", trained)
    assert code == 2 and "--run must be of an agent with 6 tokens" in err


def test_what_the_policy_draws_is_inside_the_agents_own_masks():
    env = textrl.TextEnv(Copy(), render_mode="ansi")
    agent = NLPO(env, device="cpu", top_p=0.3)
    session = Session(env, agent, None, 0)
    for _ in range(20):
        here, allowed = session.observation.copy(), agent.narrow(session.observation[None])[0]
        session.go("")
        assert allowed[env.tokens[(here != env.task.vocab_size).sum()]]
        if session.final is not None:
            session.new()


def test_a_model_brings_its_tokenizer(play, tmp_path, capsys):
    small_model(9, 200).save_pretrained(tmp_path / "model")
    textrl.symbol_tokenizer("abcdefgh").save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "abc"}\n')
    code, _, err = play("textrl/Text-v0", "--model", tmp_path / "model", "--env-arg", 'prompts=["abc"]')
    assert (code, err) == (0, "")
    which = ["--env", "textrl/Text-v0", "--model", str(tmp_path / "model")]
    which += ["--prompts", str(tmp_path / "prompts.jsonl"), "--dataset", str(tmp_path / "data")]
    assert cli.main(["collect", *which, "--episodes", "4"]) == 0
    assert cli.main(["ope", *which]) == 0
