"""The correctness list of RLHF, line by line: what other projects got wrong, held by numbers."""

import copy
import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import textrl
from textrl.agents import PPO, REINFORCE, SFT
from textrl.batch import microbatches, pad_responses
from textrl.drawing import Sampling, draw
from textrl.envs.copy import Copy
from textrl.generation import generate
from textrl.models import load_model, small_model, train_last_layers
from textrl.optim import Optimizer
from textrl.policy import CausalPolicy, alike, values_at
from textrl.reward_training import RewardModelConfig, preference_loss, train_reward_model
from textrl.rewards import RewardModel
from textrl.rollout import sample_episodes
from textrl.scalars import value_model
from textrl.slots import WholeTexts
from textrl.stepwise import StepwiseLM
from textrl.trunk import frozen_blocks, same_blocks, states_below


class Letters(textrl.Task):
    """Prompts of different lengths; the score is the number of a's."""

    def __init__(self, length=6):
        super().__init__(tokenizer=textrl.symbol_tokenizer("abc"), max_new_tokens=length)

    def prompts(self):
        return [{"prompt": p} for p in ("", "a", "abc", "cabca")]

    def score(self, prompts, completions, **columns):
        return [float(text.count("a")) for text in completions]


def llama(vocab=4, layers=2, seed=0, **changes):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=0, bos_token_id=0, initializer_range=0.3,
        **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


MODELS = {"gpt2": lambda seed=0: sharp(small_model(4, 64, seed)), "llama": lambda seed=0: llama(seed=seed)}


def sharp(model):
    """Random weights large enough that the distributions are far from even."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(8)
    return model


def rollout_of(model, env, n=16, seed=0):
    policy = CausalPolicy(model, env.task.vocab_size, env.temperature)
    rows = [env.task.rows[i % 4] for i in range(n)]
    return policy, sample_episodes(env, policy, rows, generator=torch.Generator().manual_seed(seed))


# ---- reward ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", MODELS)
def test_reward_is_penalty_at_every_token_and_score_at_the_last(name, temperature):
    model, reference = MODELS[name](0), MODELS[name](1)
    env = textrl.TextEnv(Letters(), reference=reference, kl_coef=0.3, temperature=temperature)
    _, rollout = rollout_of(model, env)
    assert not rollout.rewards.requires_grad
    for i in range(len(rollout)):
        p, n = int(rollout.prompt_lengths[i]), int(rollout.action_mask[i].sum())
        row = rollout.tokens[i, : p + n]
        logp, ref = (
            (m(input_ids=row[None]).logits[0, p - 1 : -1] / temperature).log_softmax(-1) for m in (model, reference)
        )
        chosen = row[p:, None]
        want = -0.3 * (logp.gather(1, chosen) - ref.gather(1, chosen))[:, 0]
        want[-1] += rollout.completions[i].count("a")
        torch.testing.assert_close(rollout.rewards[i, :n], want.detach(), atol=2e-5, rtol=1e-4)
        assert (rollout.rewards[i, n:] == 0).all()


def test_the_policys_penalty_goes_to_zero_for_the_reference_itself():
    model = MODELS["gpt2"]()
    env = textrl.TextEnv(Letters(), reference=model, kl_coef=1.0, temperature=0.5)
    _, rollout = rollout_of(copy.deepcopy(model), env)
    torch.testing.assert_close(rollout.logprobs, rollout.ref_logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rollout.rewards.sum(1), rollout.scores, atol=1e-4, rtol=1e-5)
    assert (rollout.rewards.sum(1) != 0).any()


# ---- numerics -------------------------------------------------------------------------------------------------


def test_log_softmax_is_float32_whatever_the_dtype_of_the_model():
    model = llama().to(torch.bfloat16)
    policy = CausalPolicy(model, 4)
    tokens = torch.tensor([[0, 1, 2, 3]])
    hidden = policy.hidden(tokens, torch.tensor([0, 0]), torch.tensor([1, 2]))
    assert hidden.dtype == torch.bfloat16
    logprobs, entropy = policy.logprobs(hidden, torch.tensor([2, 3]), entropy=True)
    assert logprobs.dtype == entropy.dtype == torch.float32
    want = model.lm_head(hidden).float().log_softmax(-1)
    torch.testing.assert_close(logprobs, want[[0, 1], [2, 3]], atol=1e-6, rtol=1e-6)


def test_dropout_is_off_in_every_model():
    config = GPT2Config(vocab_size=4, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    assert config.resid_pdrop > 0
    reference, model = GPT2LMHeadModel(config), GPT2LMHeadModel(config).train()
    env = gym.make("textrl/Copy-v0", reference=reference, kl_coef=0.1)
    agent = PPO(env, model, batch_size=8)
    agent.learn(64)
    for each in (agent.model, agent.critic, env.unwrapped.reference):
        assert not each.training
        assert all(m.p == 0 for m in each.modules() if isinstance(m, nn.Dropout))


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("name", MODELS)
def test_the_first_minibatchs_ratio_is_one(name, critic):
    env = textrl.TextEnv(Letters(), reference=MODELS[name](1), kl_coef=0.1, temperature=0.8)
    agent = PPO(env, MODELS[name](0), critic=None, batch_size=16, learning_rate=1e-3)
    agent = PPO(env, MODELS[name](0), config=replace(agent.config, critic=critic))
    metrics = agent.update(agent.collect())
    assert metrics["first_ratio_error"] < 1e-4


def test_a_lower_precision_is_corrected_and_measured():
    env = textrl.TextEnv(Letters())
    agent = PPO(env, llama(), batch_size=32, dtype="bfloat16")
    rollout = agent.collect()
    assert rollout.metrics()["rollout/logprob_drift"] == pytest.approx(rollout.drift) and rollout.drift > 0
    metrics = agent.update(rollout)
    assert metrics["first_ratio_error"] < 1e-2
    assert PPO(env, llama(), batch_size=32, dtype="float32").collect().drift == 0


@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_no_logprob_value_or_gradient(name):
    model = MODELS[name]()
    critic = value_model(model, std=1.0)
    env = textrl.TextEnv(Letters())
    policy, rollout = rollout_of(model, env)

    def look(part):
        model.zero_grad()
        rows, columns, targets = part.places()
        logprobs, entropy = policy.logprobs(policy.hidden(part.tokens, rows, columns), targets, entropy=True)
        values = values_at(critic, part.tokens, rows, columns)
        (logprobs * torch.arange(1, len(logprobs) + 1)).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return logprobs.detach(), values.detach(), entropy.detach(), gradient

    order = rollout.tokens.shape[1] - (rollout.prompt_lengths + rollout.response_lengths)
    shortest = int(order.argmax())
    alone = rollout.select(torch.tensor([shortest]))
    assert alone.tokens.shape[1] < rollout.tokens.shape[1]
    padded = replace(
        alone,
        tokens=nn.functional.pad(alone.tokens, (0, 7), value=3),
        action_mask=nn.functional.pad(alone.action_mask, (0, 7)),
        logprobs=nn.functional.pad(alone.logprobs, (0, 7)),
    )
    for a, b in zip(look(alone), look(padded), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_order_and_company_of_a_batch_change_nothing(name):
    env = textrl.TextEnv(Letters())
    policy, rollout = rollout_of(MODELS[name](), env)
    order = torch.randperm(len(rollout), generator=torch.Generator().manual_seed(1))
    mixed = rollout.select(order)
    rows, columns, targets = mixed.places()
    logprobs = mixed.spread(policy.logprobs(policy.hidden(mixed.tokens, rows, columns), targets)[0])
    torch.testing.assert_close(logprobs.detach(), rollout.logprobs[order], atol=1e-5, rtol=1e-5)
    parts = microbatches(rollout, 20)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(rollout)))
    assert all(len(p) == 1 or rollout.select(p).tokens.numel() <= 20 for p in parts)


def test_texts_of_like_length_stand_together():
    lengths = [3, 1600, 4, 1590, 800, 5]
    cpu = torch.device("cpu")
    assert alike(lengths, 10**6, cpu) == [[1, 3, 4], [5, 2, 0]]  # 810 of padding with the third, then 1595 more
    assert alike(lengths, 3500, cpu) == [[1, 3], [4, 5], [2, 0]]
    assert alike(lengths, 10**6, cpu, width=2) == [[1, 3], [4], [5, 2, 0]]
    assert alike(lengths, 10**6, torch.device("cuda")) == [[1, 3, 4, 5, 2, 0]]


# ---- tokens and masks -----------------------------------------------------------------------------------------


def test_masks_come_from_lengths_though_padding_and_end_are_one_id():
    task = Letters()
    assert task.tokenizer.pad_token_id == task.eos_token_id == task.tokenizer.bos_token_id == 0
    tokens, prompt_lengths, mask = pad_responses([[0], [0, 1]], [[0], [1, 0]], torch.device("cpu"))
    assert tokens.tolist() == [[0, 0, 0, 0], [0, 1, 1, 0]]
    assert prompt_lengths.tolist() == [1, 2]
    assert mask.tolist() == [[True, False], [True, True]]


def test_sampled_ids_reach_the_loss_untouched():
    """Ids that no tokenizer would give for their own text: "ab" as two tokens though the vocabulary has it as one."""
    tokenizer = textrl.symbol_tokenizer(["a", "b", "ab"])

    class Seen(textrl.Task):
        def __init__(self):
            super().__init__(tokenizer=tokenizer, max_new_tokens=2)

        def prompts(self):
            return [{"prompt": ""}]

        def score(self, prompts, completions, completion_ids, **columns):
            self.seen = completion_ids
            return [0.0] * len(prompts)

    task = Seen()
    agent = REINFORCE(textrl.TextEnv(task), batch_size=128)
    rollout = agent.collect()
    ids = [r[: int(n)].tolist() for r, n in zip(rollout.responses, rollout.response_lengths, strict=True)]
    assert ids == task.seen
    split = ids.index([1, 2])
    assert rollout.completions[split] == "ab"
    assert tokenizer("ab")["input_ids"] == [3]


def test_stopping_is_told_apart_from_running_out():
    env = textrl.TextEnv(Letters(3))
    _, rollout = rollout_of(small_model(4, 64), env, 64)
    last = rollout.responses.gather(1, rollout.response_lengths[:, None] - 1)[:, 0]
    assert (rollout.stopped == (last == 0)).all()
    assert 0 < rollout.stopped.float().mean() < 1
    assert (rollout.response_lengths[~rollout.stopped] == 3).all()


# ---- generation -----------------------------------------------------------------------------------------------


def test_draw_is_the_inverse_of_the_cumulative_distribution():
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log().expand(5, 3)
    uniforms = torch.tensor([0.0, 0.199, 0.201, 0.699, 0.99999994])
    tokens, logprobs = draw(logits, uniforms, Sampling())
    assert tokens.tolist() == [0, 0, 1, 1, 2]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.2, 0.2, 0.5, 0.5, 0.3]))


def test_truncation_renormalises():
    logits = torch.tensor([[0.1, 0.5, 0.25, 0.15]]).log()
    tokens, logprobs = draw(logits.expand(50, 4), torch.linspace(0, 0.999, 50), Sampling(top_k=2))
    assert set(tokens.tolist()) == {1, 2}
    torch.testing.assert_close(logprobs[0].exp(), torch.tensor(2 / 3))
    tokens, logprobs = draw(logits.expand(50, 4), torch.linspace(0, 0.999, 50), Sampling(top_p=0.8))
    assert set(tokens.tolist()) == {1, 2, 3}
    torch.testing.assert_close(logprobs[0].exp(), torch.tensor(0.5 / 0.9))
    assert draw(logits, torch.tensor([0.99]), Sampling(deterministic=True))[0].tolist() == [1]


@pytest.mark.parametrize("name", MODELS)
def test_the_cached_loop_equals_the_plain_one(name, monkeypatch):
    model = MODELS[name]()
    policy = CausalPolicy(model, 4, 0.9)
    prompts = [np.array([0, *p]) for p in ([], [1, 2], [3] * 7, [2])] * 8
    for group in (prompts, [prompts[1]] * 32):  # ragged, and all alike
        cached = generate(policy, group, 9, [0], generator=torch.Generator().manual_seed(3))
        with monkeypatch.context() as patch:
            patch.setattr("textrl.generation.slots_for", WholeTexts)
            plain = generate(policy, group, 9, [0], generator=torch.Generator().manual_seed(3))
        assert cached.responses.tolist() == plain.responses.tolist()
        assert cached.lengths.tolist() == plain.lengths.tolist()
        torch.testing.assert_close(cached.logprobs, plain.logprobs, atol=1e-5, rtol=1e-4)
        assert 1 < cached.lengths.float().mean() < 9


def test_a_stepper_without_a_cache_says_the_same(monkeypatch):
    policy, chance = CausalPolicy(MODELS["gpt2"](), 4), np.random.default_rng(0)
    observations, lengths = np.full((3, 9), 4), np.array([1, 2, 3])
    for row, n in zip(observations, lengths, strict=True):
        row[:n] = chance.integers(4, size=n)
    cached, plain = StepwiseLM(policy), StepwiseLM(policy)
    for _ in range(30):
        with monkeypatch.context() as patch:
            patch.setattr("textrl.stepwise.slots_for", WholeTexts)
            found = plain(observations)
        torch.testing.assert_close(found, cached(observations), atol=1e-5, rtol=1e-4)
        for i, row in enumerate(observations):
            if lengths[i] == 9 or chance.random() < 0.2:  # begins anew, while others go on or stand still
                row[:], lengths[i] = 4, 0
            if lengths[i] == 0 or chance.random() < 0.7:
                row[lengths[i]] = chance.integers(4)
                lengths[i] += 1


def test_a_rows_sample_depends_on_no_other_row():
    policy = CausalPolicy(MODELS["gpt2"](), 4)
    prompts = [np.array([0, *p]) for p in ([], [1, 2], [3] * 7, [2])]
    together = generate(policy, prompts, 9, [0], generator=torch.Generator().manual_seed(3))
    for i, prompt in enumerate(prompts):
        alone = generate(policy, [prompt] * 4, 9, [0], generator=torch.Generator().manual_seed(3))
        assert alone.responses[i].tolist() == together.responses[i].tolist()


def test_minimum_length_and_several_ends():
    policy = CausalPolicy(small_model(5, 64), 5)
    sampling = Sampling(min_new_tokens=4)
    out = generate(policy, [np.array([0])] * 64, 9, [0, 3], sampling=sampling, generator=torch.Generator())
    assert out.lengths.min() >= 4
    last = out.responses.gather(1, out.lengths[:, None] - 1)[:, 0]
    assert set(last[out.lengths < 9].tolist()) == {0, 3}


# ---- the four models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_critic_starts_at_zero_on_a_copy_of_the_trunk(name):
    model = MODELS[name]()
    critic = value_model(model)
    tokens = torch.tensor([[0, 1, 2, 3]])
    assert values_at(critic, tokens, torch.tensor([0, 0]), torch.tensor([1, 3])).tolist() == [0, 0]
    states = [m.base_model(input_ids=tokens).last_hidden_state for m in (model, critic)]
    torch.testing.assert_close(*states)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in critic.parameters()}


def test_a_reward_models_head_starts_at_its_std_and_the_critic_can_start_from_it():
    model = llama()
    reward = RewardModel.from_language_model(model, textrl.symbol_tokenizer("abc"))
    assert abs(float(reward.model.score.weight.std()) * math.sqrt(33) - 1) < 0.3
    assert reward.model.score.bias is None
    with torch.no_grad():
        reward.model.base_model.embed_tokens.weight.add_(0.1)
    agent = PPO(textrl.TextEnv(Letters()), copy.deepcopy(model), critic=reward)
    torch.testing.assert_close(agent.critic.base_model.embed_tokens.weight, reward.model.base_model.embed_tokens.weight)
    assert (agent.critic.score.weight == 0).all()
    assert (reward.model.score.weight != 0).any()


def test_a_critic_of_another_size_than_the_policy_is_loaded_with_it(tmp_path):
    env = textrl.TextEnv(Letters())
    for policy in (llama(), textrl.tabular_model(env.task)):
        agent = PPO(env, policy, critic=value_model(small_model(5, 64)), batch_size=16, device="cpu")
        agent.update(agent.collect())
        agent.save(tmp_path / "agent")
        again, rollout = PPO.load(tmp_path / "agent", env), agent.collect()
        assert type(again.critic) is type(agent.critic)
        assert torch.equal(again.value(rollout), agent.value(rollout))
    with pytest.raises(ValueError, match=r"^critic must be .*shared.*a RewardModel or a scalar model; got 3$"):
        PPO(env, llama(), critic=3)


def test_policy_and_critic_can_share_one_trunk():
    agent = PPO(textrl.TextEnv(Letters()), llama(), batch_size=16, learning_rate=1e-3)
    shared = PPO(textrl.TextEnv(Letters()), llama(), replace(agent.config, critic="shared"))
    count = [sum(p.numel() for p in a.optimizer.parameters) for a in (agent, shared)]
    assert count[1] < 0.6 * count[0]
    metrics = shared.update(shared.collect())
    assert shared.value_head.weight.abs().sum() > 0
    assert math.isfinite(metrics["value_loss"])


def test_preference_loss_by_hand():
    loss = preference_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
    want = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2
    assert abs(float(loss) - want) < 1e-6


def test_a_reward_model_learns_and_is_standardised():
    from datasets import Dataset

    texts = ["aab", "abc", "bbc", "ccb", "aaa", "cbc"]
    pairs = [(a, b) for a in texts for b in texts if a.count("a") > b.count("a")]
    data = Dataset.from_list([{"prompt": "", "chosen": a, "rejected": b} for a, b in pairs])
    reward = RewardModel.from_language_model(small_model(4, 32), textrl.symbol_tokenizer("abc"))
    before = reward.accuracy(data)
    train_reward_model(reward, data, RewardModelConfig(learning_rate=1e-2, batch_size=5, epochs=12))
    assert reward.accuracy(data) == 1.0 > before
    whole = data.add_column("group", [0] * len(data))
    again = RewardModel.from_language_model(small_model(4, 32), textrl.symbol_tokenizer("abc"))
    plain = RewardModel.from_language_model(small_model(4, 32), textrl.symbol_tokenizer("abc"))
    before_training = plain.scalars(texts).detach()
    settings = RewardModelConfig(learning_rate=1e-3, batch_size=1)
    train_reward_model(again, whole, settings)  # one group, one step: as a batch of all pairs
    train_reward_model(plain, data, RewardModelConfig(learning_rate=1e-3, batch_size=len(data)))
    torch.testing.assert_close(again.scalars(texts), plain.scalars(texts), atol=1e-3, rtol=0)
    assert float((again.scalars(texts) - before_training).abs().max()) > 1e-2  # it did learn
    reward.standardise([""] * 6, texts)
    scores = torch.tensor(reward(prompts=[""] * 6, completions=texts))
    assert abs(float(scores.mean())) < 1e-4
    assert abs(float(scores.std()) - 1) < 1e-4


def test_a_reward_models_score_does_not_depend_on_its_company(tmp_path):
    reward = RewardModel(value_model(llama(), std=1.0), textrl.symbol_tokenizer("abc"), tokens_at_once=10)
    texts = ["a", "abcabc", "", "cc", "cabc"]
    together = reward([""] * 5, texts)
    alone = [reward([""], [text])[0] for text in texts]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    reward.mean, reward.std = 1.5, 2.0
    reward.save(tmp_path / "rm")
    again = RewardModel.load(tmp_path / "rm")
    np.testing.assert_allclose(again([""] * 5, texts), (np.array(together) - 1.5) / 2, atol=1e-5)


def test_frozen_lower_blocks_run_once_to_the_same_effect():
    model = llama(layers=4)
    train_last_layers(model, 2)
    assert frozen_blocks(model) == 2
    critic = value_model(model, std=1.0)
    assert same_blocks(model, critic, 2)
    with torch.no_grad():
        critic.base_model.layers[3].mlp.down_proj.weight.add_(0.1)
    assert same_blocks(model, critic, 3)
    assert not same_blocks(model, critic, 4)
    tokens, rows, columns = torch.randint(0, 4, (3, 9)), torch.arange(3), torch.tensor([8, 4, 2])
    below = states_below(model, tokens, 2)
    policy = CausalPolicy(model, 4)
    plain = policy.hidden(tokens, rows, columns)
    policy.frozen_blocks = 2
    torch.testing.assert_close(policy.hidden(tokens, rows, columns, below), plain)
    torch.testing.assert_close(
        values_at(critic, tokens, rows, columns, below, 2), values_at(critic, tokens, rows, columns)
    )
    env = textrl.TextEnv(Letters(), reference=copy.deepcopy(model), kl_coef=0.1)
    agent = PPO(env, model, trainable_layers=2, batch_size=16, learning_rate=1e-2)
    frozen = agent.model.model.layers[0].mlp.down_proj.weight.clone()
    learned = agent.model.model.layers[3].mlp.down_proj.weight.clone()
    agent.learn(200)
    assert torch.equal(agent.model.model.layers[0].mlp.down_proj.weight, frozen)
    assert not torch.equal(agent.model.model.layers[3].mlp.down_proj.weight, learned)
    rollout = agent.collect()
    assert rollout.below is not None
    want = env.reference(input_ids=rollout.tokens).logits.log_softmax(-1)
    rows, columns, targets = rollout.places()
    torch.testing.assert_close(
        rollout.ref_logprobs[rollout.action_mask], want[rows, columns, targets], atol=1e-5, rtol=1e-4
    )


def test_a_lower_precision_leaves_the_turns_of_far_places_alone(tmp_path):
    llama().bfloat16().save_pretrained(tmp_path)
    Copy().tokenizer.save_pretrained(tmp_path)
    env = textrl.TextEnv(Copy(), reference=str(tmp_path), kl_coef=0.1)
    agent = PPO(env, llama(), dtype="bfloat16", device="cpu")
    scorer = RewardModel.from_language_model(agent.model, agent.tokenizer)
    exact = llama().model.rotary_emb.inv_freq
    for model in (env.reference, agent.model, agent.critic, scorer.model):
        assert model.dtype == torch.bfloat16 and torch.equal(model.model.rotary_emb.inv_freq, exact)


def test_a_critic_runs_its_frozen_blocks_where_nobody_else_has():
    env = textrl.TextEnv(Copy(), reference=llama(), kl_coef=0.1)
    agent = PPO(env, llama(), trainable_layers=1, batch_size=8, device="cpu", learning_rate=1e-2)
    agent.learn(60)
    rollout = agent.collect()
    assert rollout.below is not None and agent.policy.frozen_blocks
    alone = replace(rollout, below=None)
    torch.testing.assert_close(agent.value(alone), agent.value(rollout))
    assert agent.value(alone).abs().max() > 1e-3


def test_one_metric_a_name():
    env = textrl.TextEnv(Letters(), reference=MODELS["gpt2"](), kl_coef=0.1)
    seen = {}
    PPO(env, MODELS["gpt2"](), batch_size=8).learn(8, callback=lambda agent, metrics: seen.update(metrics))
    assert {
        "train/kl_old_new", "rollout/kl_reference", "train/entropy", "train/clip_fraction", "train/explained_variance",
        "rollout/score", "rollout/response_length", "rollout/stopped", "time/tokens_per_second",
    } <= set(seen)  # fmt: skip


# ---- vocabulary -----------------------------------------------------------------------------------------------


def test_rows_of_the_head_beyond_the_tokenizer_are_never_used():
    model = small_model(9, 64)
    _, rollout = rollout_of(model, textrl.TextEnv(Letters()), 64)
    assert rollout.tokens.max() < 4
    rows, columns, targets = rollout.places()
    want = model(input_ids=rollout.tokens).logits[..., :4].log_softmax(-1)[rows, columns, targets]
    torch.testing.assert_close(rollout.logprobs[rollout.action_mask], want.detach(), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"4 tokens.*only 3"):
        load_model(small_model(3, 8), textrl.symbol_tokenizer("abc"))


def test_sft_learns_responses_and_their_end():
    rows = [{"prompt": p, "completion": p[::-1]} for p in ("a", "abc", "cab")]
    env = textrl.TextEnv(Letters())
    agent = SFT(env, dataset=rows, batch_size=3, learning_rate=5e-3)
    agent.learn(1200)
    assert agent.generate(["a", "abc", "cab"], deterministic=True) == ["a", "cba", "bac"]


def test_the_gradient_of_each_model_is_clipped_by_its_own_norm() -> None:
    """A critic's large gradient leaves the policy's step as it is."""
    steps = []
    for scale in (1.0, 1000.0):
        policy, critic = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
        for module, value in ((policy, 0.25), (critic, scale)):
            for parameter in module.parameters():
                torch.nn.init.zeros_(parameter)
                parameter.grad = torch.full_like(parameter, value)
        optimizer = Optimizer(policy.parameters(), critic.parameters(), learning_rate=0.1, max_grad_norm=0.5)
        norm = optimizer.step()
        assert norm == pytest.approx(math.sqrt(6 * 0.25**2 + 3 * scale**2))
        steps.append(policy.weight.detach().clone())
    torch.testing.assert_close(steps[0], steps[1], atol=0, rtol=0)


def test_tables_and_other_weights_keep_their_moments_apart():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(4, 3)) for _ in range(3)]
    optimizer = Optimizer(weights, learning_rate=0.1, tables=[weights[1]])

    def step(optimizer, used=slice(None)):
        for weight in optimizer.parameters:
            weight.grad = torch.zeros_like(weight)
            weight.grad[used] = 1.0
        optimizer.step()

    step(optimizer)
    again = [nn.Parameter(weight.detach().clone()) for weight in weights]
    other = Optimizer(again, learning_rate=0.1, tables=[again[1]])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    still = weights[1].detach().clone()
    for each in (optimizer, other):
        step(each, used=[0])
    for weight, copied in zip(weights, again, strict=True):
        torch.testing.assert_close(weight, copied, atol=0, rtol=0)
    assert torch.equal(weights[1][1:], still[1:]) and not torch.equal(weights[1][0], still[0])
    with pytest.raises(ValueError, match="keep trainable_layers, row_clocks"):
        Optimizer(again, learning_rate=0.1).load_state_dict(optimizer.state_dict())


def test_weights_below_float32_are_stepped_through_float32_copies():
    torch.manual_seed(0)
    weights = [
        nn.Parameter(torch.randn(7, 5).bfloat16()),
        nn.Parameter(torch.randn(3)),
        nn.Parameter(torch.randn(4).half()),
    ]
    copies = [nn.Parameter(weight.detach().float().clone()) for weight in weights]
    optimizer = Optimizer(weights, learning_rate=0.1)
    plain = torch.optim.AdamW(copies, lr=0.1, eps=1e-5, weight_decay=0, fused=True)
    for _ in range(3):
        for weight, wide in zip(weights, copies, strict=True):
            weight.grad = torch.randn_like(weight)
            wide.grad = weight.grad.float().clone()
        norm = nn.utils.clip_grad_norm_(copies, 1.0)
        plain.step()
        assert optimizer.step() == pytest.approx(float(norm), rel=1e-6)
        for weight, wide in zip(weights, copies, strict=True):
            assert torch.equal(weight, wide.to(weight.dtype))
