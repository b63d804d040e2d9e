"""Single lines whose loss nothing else would notice: baselines, masks, temperatures, who takes which cache."""

import gymnasium as gym
import numpy as np
import pytest
import torch
import transformers as hf
from test_agents import Bigrams, fixed_rollout, tabular_agent
from test_flat import gpt2, llama
from test_offline import Weighted

import textrl
from textrl.agents import A2C, REINFORCE, SFT, BestOfN
from textrl.agents.reinforce import policy_gradient_loss
from textrl.asking import Asking
from textrl.batch import lower_states
from textrl.critic import Critic, bootstrapped, with_advantages
from textrl.episodes import take_in
from textrl.flat import flat_of
from textrl.generation import generate
from textrl.models import small_model
from textrl.policy import CausalPolicy
from textrl.returns import explained_variance
from textrl.slots import Slots, cacheable, slots_for
from textrl.tabular import tabular_model


def test_a_learned_baseline_is_taken_off_the_reward_to_go():
    agent = tabular_agent(REINFORCE, baseline="value")
    agent.value = lambda batch: batch.action_mask * 0.5
    returns = torch.tensor([[3.0, 2.0], [1.0, 0.0]])
    assert agent.advantages(fixed_rollout(), returns).tolist() == [[2.5, 1.5], [0.5, 0]]


def test_the_mean_of_the_other_samples_counts_the_running_mean_before_this_batch():
    agent = tabular_agent(REINFORCE)
    agent.running_mean = 10.0
    found = agent.advantages(fixed_rollout(), torch.tensor([[3.0, 3.0], [1.0, 0.0]]))
    assert found.tolist() == [[3 - (10 + 1) / 2] * 2, [1 - (10 + 3) / 2, 0]]
    assert agent.running_mean == pytest.approx(0.9 * 10 + 0.1 * 2)


class Masked(Bigrams):
    """No token follows itself."""

    def allowed_tokens(self, rows, responses):
        written = (responses < self.vocab_size).sum(1)
        last = responses[np.arange(len(responses)), np.maximum(written - 1, 0)]
        return (np.arange(self.vocab_size) != last[:, None]) | (written == 0)[:, None]


def test_a2cs_loss_is_about_what_tokens_are_drawn_from_inside_the_masks():
    task = Masked()
    agent = A2C(textrl.TextEnv(task), tabular_model(task, std=1.0), batch_size=16, whiten_advantages=False)
    rollout, seen = agent.collect(), []
    agent.minimise = lambda loss, batch: seen.append((batch, loss(batch)[1])) or {"loss": 0.0}
    agent.update(rollout)
    batch, numbers = seen[0]
    expected = policy_gradient_loss(rollout.logprobs, batch.advantages, batch.action_mask)
    assert float(numbers["policy_loss"]) == pytest.approx(float(expected), abs=1e-5)


def test_the_explained_variance_is_that_of_the_returns():
    rollout = fixed_rollout()
    found, known = with_advantages(rollout, lambda batch: batch.action_mask * 0.5, 1000, 1.0, 0.95, False)
    assert known == pytest.approx(explained_variance(found.values, found.returns, found.action_mask))
    assert known == pytest.approx(0, abs=1e-5)  # a constant critic knows nothing


def test_a_critic_reads_the_policys_lower_states_only_where_its_own_are_the_same():
    policy = CausalPolicy(llama(), 11)
    policy.frozen_blocks = 2
    assert Critic(policy, policy.model, 1)._blocks == 2
    other = llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.add_(0.01)
    assert Critic(policy, other, 1)._blocks == 0


@pytest.mark.parametrize("end_token", [True, False])
def test_sft_adds_the_end_token_where_it_is_told_to(end_token):
    rows = [{"prompt": "a", "completion": "bc"}, {"prompt": "b", "completion": "ca"}]
    agent = SFT(textrl.TextEnv(Weighted()), dataset=rows, batch_size=2, end_token=end_token, device="cpu")
    batch = agent.collect()
    assert batch.stopped.tolist() == [end_token] * 2
    assert batch.response_lengths.tolist() == [2 + end_token] * 2


def test_the_best_of_n_draws_at_the_environments_temperature():
    task = Weighted()
    model = tabular_model(task, std=1.0)
    cold = BestOfN(textrl.TextEnv(task, temperature=1e-3), model, n=32, device="cpu")
    assert cold.generate(["a", "b"]) == cold.generate(["a", "b"], deterministic=True)
    warm = BestOfN(textrl.TextEnv(task), model, n=32, device="cpu")
    assert warm.generate(["a", "b"]) != warm.generate(["a", "b"], deterministic=True)


def test_the_best_of_n_keeps_to_a_least_length():
    task = Weighted()
    task.score = lambda prompts, completions, **columns: [-float(len(text)) for text in completions]
    agent = BestOfN(textrl.TextEnv(task), small_model(4, 8, 0), n=32, device="cpu")
    assert agent.generate(["a", "b"]) == ["", ""]
    assert [len(text) for text in agent.generate(["a", "b"], min_new_tokens=2)] == [2, 2]


def test_the_best_of_n_is_the_best_of_what_was_scored():
    task = Weighted()
    task.score = lambda prompts, completions, **columns: [
        float("nan") if text.startswith("a") else float(len(text)) for text in completions
    ]
    agent = BestOfN(textrl.TextEnv(task), tabular_model(task), n=64, device="cpu", on_score_error="drop")
    for text in agent.generate(["a", "b", "a"]):
        assert len(text) == 4 and text[0] != "a"


def test_the_best_of_n_says_nothing_of_its_kl():
    task = Weighted()
    env = textrl.TextEnv(task, reference=small_model(4, 8, 1), kl_coef=0.1)
    assert BestOfN(env, small_model(4, 8, 0), n=2, batch_size=4, device="cpu").collect().ref_logprobs is None


def test_logged_episodes_are_held_against_this_environments_reference():
    task = Weighted()
    env = textrl.TextEnv(task, reference=small_model(4, 8, 1), kl_coef=0.5, temperature=2.0)
    agent = textrl.Agent(env, small_model(4, 8, 2), batch_size=8, device="cpu")
    logged = agent.collect()
    right = logged.ref_logprobs
    logged.ref_logprobs = torch.zeros_like(right)  # what another reference said
    found = take_in(logged, env, 1000)
    torch.testing.assert_close(logged.ref_logprobs, right)
    torch.testing.assert_close(found, logged.scores - 0.5 * (logged.logprobs - right).sum(1))


def test_a_snapshot_knows_that_its_episode_is_over_and_what_was_paid():
    env = textrl.TextEnv(Weighted())
    env.reset(seed=0)
    env.step(1)
    _, reward, terminated, _, _ = env.step(0)
    assert terminated
    over = env.snapshot()
    assert over.rewards == (0.0, reward)
    env.reset()
    assert env.snapshot().rewards == ()  # a new episode has been paid nothing
    env.restore(over)
    with pytest.raises(gym.error.ResetNeeded, match="after the end"):
        env.step(1)


class ByToken(Weighted):
    """Scores every token; fails where two tokens are written and the first is 2."""

    def __init__(self):
        super().__init__()
        self.asking = Asking(drop=True)
        self.token_scores = True

    def score(self, prompts, completions, completion_ids, **columns):
        if any(len(ids) == 2 and ids[0] == 2 for ids in completion_ids):
            raise RuntimeError("two")
        return [[1.0] * len(ids) for ids in completion_ids]


def test_a_token_whose_score_fails_is_paid_nan():
    one, many = textrl.TextEnv(ByToken()), textrl.TextVectorEnv(ByToken(), num_envs=2)
    one.reset(seed=0), many.reset(seed=0)
    assert [one.step(token)[1] for token in (2, 1, 1)] == pytest.approx([1, np.nan, 1], nan_ok=True)
    rewards = np.stack([many.step(np.array(tokens))[1] for tokens in ([1, 2], [1, 1], [1, 1])])
    assert rewards[:, 0].tolist() == [1, 1, 1]
    assert rewards[:, 1].tolist() == pytest.approx([1, np.nan, 1], nan_ok=True)


def test_attention_dropout_pre_hooks_and_partly_rotary_positions_keep_the_models_own_forward():
    model = llama(attention_dropout=0.1)
    assert flat_of(model) is not None
    assert flat_of(model.train()) is None
    model = gpt2()
    handle = model.transformer.h[0].register_forward_pre_hook(lambda module, given: None)
    assert flat_of(model) is None
    handle.remove()
    assert flat_of(model) is not None
    partly = llama()
    partly.config.rope_parameters = {**partly.config.rope_parameters, "partial_rotary_factor": 0.5}
    assert flat_of(partly) is None


def test_an_eager_model_with_a_cache_does_not_see_beyond_a_rows_end():
    model = gpt2()
    model.set_attn_implementation("eager")
    model.transformer.h[0].register_forward_hook(lambda *_: None)  # its own forward
    policy = CausalPolicy(model, 11)
    assert isinstance(slots_for(policy, 2, 16), Slots)
    prompts = [np.array([1, 2, 3, 4, 5, 6]), np.array([7])]
    found = generate(policy, prompts, 8, [], generator=torch.Generator().manual_seed(0))
    for i, prompt in enumerate(prompts):
        text = torch.cat([torch.from_numpy(prompt), found.responses[i]])[None]
        with torch.no_grad():
            logits = model(input_ids=text).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logits.gather(-1, found.responses[i][:, None])[:, 0]
        torch.testing.assert_close(found.logprobs[i], expected, atol=1e-4, rtol=1e-4)


def test_alibi_and_windows_that_are_too_short_take_no_cache_of_ours():
    sizes = {"vocab_size": 11, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    for alibi in (True, False):
        falcon = hf.FalconForCausalLM(hf.FalconConfig(**sizes, alibi=alibi))
        assert cacheable(falcon, 8) == (not alibi)
    mpt = hf.MptForCausalLM(hf.MptConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=11))
    assert not cacheable(mpt, 8)
    mistral = hf.MistralForCausalLM(
        hf.MistralConfig(**sizes, intermediate_size=32, num_key_value_heads=1, sliding_window=8)
    )
    assert cacheable(mistral, 8) and not cacheable(mistral, 9)


def test_a_text_that_goes_on_is_read_beyond_its_lower_states():
    """A critic is asked for one more token than the states below are of."""
    policy = CausalPolicy(llama(), 11)
    policy.frozen_blocks = 2
    critic = Critic(policy, policy.model, 1)
    with torch.no_grad():
        critic.model.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    rollout = fixed_rollout()
    rollout.truncated = torch.tensor([True, False])
    plain = bootstrapped(rollout, critic, 0.9).rewards
    rollout.below = lower_states(policy, rollout, 1000)
    torch.testing.assert_close(bootstrapped(rollout, critic, 0.9).rewards, plain)
    assert not torch.equal(plain, rollout.rewards)


def test_a_module_with_a_forward_of_its_own_keeps_the_models_own():
    model = gpt2()
    block = model.transformer.h[1]
    block.forward = lambda hidden, *args, **named: hidden
    assert flat_of(model) is None
    del block.forward
    assert flat_of(model) is not None


def test_a_token_whose_score_fails_in_every_row_is_paid_nan_as_in_a_single_environment():
    one, many = textrl.TextEnv(ByToken()), textrl.TextVectorEnv(ByToken(), num_envs=2)
    one.reset(seed=0), many.reset(seed=0)
    expected = [one.step(token)[1] for token in (2, 1, 1)]
    assert expected == pytest.approx([1, np.nan, 1], nan_ok=True)
    found = [many.step(np.array([token, token]))[1].tolist() for token in (2, 1, 1)]
    assert found == [pytest.approx([each] * 2, nan_ok=True) for each in expected]


class Thirds(textrl.Task):
    """A score of texts of three letters, which no shorter text has."""

    def __init__(self, by_token=False):
        super().__init__(tokenizer=textrl.symbol_tokenizer("abc"), max_new_tokens=3)
        self.by_token = by_token

    def prompts(self):
        return [{"prompt": ""}]

    def score(self, prompts, completions, **columns):
        return [[0.0, 0.0, float(text[2] == "a")] if self.by_token else float(text[2] == "a") for text in completions]


@pytest.mark.parametrize("by_token", [False, True])
def test_a_score_that_cannot_judge_a_part_of_a_text_judges_whole_ones(by_token):
    one, many = textrl.TextEnv(Thirds(by_token)), textrl.TextVectorEnv(Thirds(by_token), num_envs=2)
    one.reset(seed=0), many.reset(seed=0)
    assert [one.step(2)[1] for _ in range(2)] == [0, 0]
    assert [many.step(np.array([2, 3]))[1].tolist() for _ in range(2)] == [[0, 0], [0, 0]]
    if by_token:  # what it could not say of the parts is missing, once
        for step in (lambda: one.step(1), lambda: many.step(np.array([1, 2]))):
            with pytest.raises(ValueError, match="score raised IndexError: string index out of range for prompt"):
                step()
        return
    assert one.step(1)[1] == 1
    assert many.step(np.array([1, 2]))[1].tolist() == [1, 0]
