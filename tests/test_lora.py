"""Adapters: one copy of the base weights, the reference as it was, files that peft reads."""

import copy
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import textrl
from textrl.adapters import adapted_critic, add_adapter, base_weights, has_adapter, lies_at, share_base, twin
from textrl.agents import A2C, DPO, GRPO, NLPO, PPO, REINFORCE, SFT, TRPO
from textrl.batch import batched_logprobs
from textrl.models import load_model, small_model
from textrl.policy import CausalPolicy
from textrl.rewards import RewardModel

peft = pytest.importorskip("peft")


class Letters(textrl.Task):
    """How many b's; from two prompts."""

    def __init__(self):
        super().__init__(tokenizer=textrl.symbol_tokenizer("abc"), max_new_tokens=4)

    def prompts(self):
        return [{"prompt": "a"}, {"prompt": ""}]

    def score(self, prompts, completions, **columns):
        return [float(text.count("b")) for text in completions]


def lora(**settings):
    return peft.LoraConfig(**{"r": 4, "lora_dropout": 0.1, "fan_in_fan_out": True, **settings})


def environment(reference, kl_coef=0.1):
    return textrl.TextVectorEnv(Letters(), num_envs=1, reference=reference, kl_coef=kl_coef)


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=4, max_position_embeddings=8, bos_token_id=0, eos_token_id=0, **sizes)
    return LlamaForCausalLM(config)


def storage(*models):
    """Numbers held by models, those in the same memory once."""
    return sum({p.untyped_storage().data_ptr(): p.numel() for m in models for p in m.parameters()}.values())


def count(model):
    return sum(p.numel() for p in model.parameters())


AGENTS = [
    (REINFORCE, {"baseline": "value"}),
    (A2C, {}),
    (PPO, {}),
    (PPO, {"critic": "shared"}),
    (TRPO, {}),
    (GRPO, {}),
    (NLPO, {}),
]


@pytest.mark.parametrize(("kind", "settings"), AGENTS, ids=lambda x: getattr(x, "__name__", ""))
def test_every_agent_learns_an_adapter_over_one_copy_of_the_base(kind, settings, tmp_path):
    base = small_model(4, 8)
    before = copy.deepcopy(base)
    env = environment(base)
    agent = kind(env, base, peft_config=lora(), learning_rate=1e-2, batch_size=16, **settings)
    size = count(before)
    assert storage(*agent.modules.values(), env.reference) < 1.1 * size
    assert sum(p.numel() for p in agent.optimizer.parameters) < 0.1 * size
    agent.learn(300)
    rollout = agent.collect()
    assert float((rollout.logprobs - rollout.ref_logprobs).abs().max()) > 0.05, "the adapter has moved"
    expected = batched_logprobs(CausalPolicy(before, 4), rollout, 1000)
    torch.testing.assert_close(rollout.ref_logprobs, expected, atol=1e-5, rtol=0)
    for name, weight in base_weights(agent.model).items():
        assert torch.equal(weight, dict(before.named_parameters())[name])
    agent.save(tmp_path / "agent")
    other = environment(copy.deepcopy(before))
    again = kind.load(tmp_path / "agent", other)
    assert storage(*again.modules.values(), other.reference) < 1.1 * size
    assert set(again.modules) == set(agent.modules)
    for name, module in agent.modules.items():
        for one, two in zip(module.parameters(), again.modules[name].parameters(), strict=True):
            assert torch.equal(one, two) and one.requires_grad == two.requires_grad, name
    assert again.learn(100).num_timesteps > agent.num_timesteps


@pytest.mark.parametrize("make", [lambda: small_model(4, 8), llama], ids=["gpt2", "llama"])
def test_peft_and_transformers_read_what_is_saved(make, tmp_path):
    base = make()
    agent = PPO(environment(base), base, peft_config=lora(fan_in_fan_out=False), learning_rate=1e-2, batch_size=16)
    agent.learn(200).save(tmp_path / "first")
    shutil.move(tmp_path / "first", tmp_path / "agent")
    tokens = torch.tensor([[0, 1, 2, 3]])
    with torch.no_grad():
        expected = agent.model(tokens).logits
        assert (base(tokens).logits - expected).abs().max() > 0.01
        over_base = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "agent").eval()
        torch.testing.assert_close(over_base(tokens).logits, expected)
        ours = textrl.Agent(environment(base), str(tmp_path / "agent"))  # the base was saved with it, and moved with it
        torch.testing.assert_close(ours.model(tokens).logits, expected)
        agent.save(tmp_path / "stays")
        for auto in (peft.AutoPeftModelForCausalLM, AutoModelForCausalLM):
            torch.testing.assert_close(auto.from_pretrained(tmp_path / "stays").eval()(tokens).logits, expected)


def test_the_update_sees_the_policy_that_drew():
    """An adapter's dropout is off as any other."""
    base = small_model(4, 8)
    agent = PPO(environment(base), base, peft_config=lora(lora_dropout=0.5, init_lora_weights=False), batch_size=16)
    assert agent.update(agent.collect())["first_ratio_error"] < 1e-4


def test_a_base_that_lies_on_disk_is_named_and_not_saved_again(tmp_path):
    small_model(4, 8, seed=3).save_pretrained(tmp_path / "base-model")
    name = str(tmp_path / "base-model")
    env = environment(name)
    agent = PPO(env, name, peft_config=lora(), batch_size=8)
    assert storage(agent.model, agent.critic, env.reference) < 1.1 * count(env.reference)
    agent.save(tmp_path / "agent")
    assert not (tmp_path / "agent/base").exists()
    said = json.loads((tmp_path / "agent/adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == name
    assert agent.load(tmp_path / "agent", environment(name)).model is not None
    with torch.no_grad():
        next(iter(base_weights(agent.model).values())).add_(1)  # no longer what lies there
    agent.save(tmp_path / "other")
    assert (tmp_path / "other/base/model.safetensors").is_file()


def test_a_model_with_an_adapter_learns_on_and_stays_the_reference():
    task, base = Letters(), small_model(4, 8)
    rows = [{"prompt": "a", "completion": "cc"}]
    sft = SFT(textrl.TextEnv(task), base, peft_config=lora(), dataset=rows, learning_rate=1e-2, batch_size=8).learn(300)
    start = copy.deepcopy(sft.model)
    env = environment(sft.model)
    agent = PPO(env, sft.model, learning_rate=1e-2, batch_size=16).learn(400)
    rollout = agent.collect()
    expected = batched_logprobs(CausalPolicy(start, 4), rollout, 1000)
    torch.testing.assert_close(rollout.ref_logprobs, expected, atol=1e-5, rtol=0)
    assert float((rollout.logprobs - rollout.ref_logprobs).abs().max()) > 0.05
    assert float((expected - batched_logprobs(CausalPolicy(base, 4), rollout, 1000)).abs().max()) > 0.5
    assert storage(agent.model, agent.critic, env.reference) < 1.2 * count(base)
    with pytest.raises(ValueError, match="peft_config must be left out for a model that has an adapter"):
        PPO(env, sft.model, peft_config=lora())


def test_a_peft_model_is_a_model():
    base = small_model(4, 8)
    wrapped = peft.get_peft_model(copy.deepcopy(base), lora(init_lora_weights=False))
    env = environment(wrapped)
    assert has_adapter(env.reference)
    agent = GRPO(env, wrapped, learning_rate=1e-2, batch_size=16).learn(200)
    learning = {name for name, p in agent.model.named_parameters() if p.requires_grad}
    assert learning and all("lora_" in name for name in learning)
    with pytest.raises(ValueError, match="model must have one adapter, and in its layers"):
        prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        GRPO(environment(base), peft.get_peft_model(copy.deepcopy(base), prompt))


def test_a_critic_from_a_reward_model_shares_that_models_weights():
    base, tokenizer = small_model(4, 8), Letters().tokenizer
    scorer = RewardModel.from_language_model(small_model(4, 8, seed=5), tokenizer)
    agent = PPO(environment(base), base, peft_config=lora(), critic=scorer, batch_size=8)
    assert storage(agent.critic, scorer.model) < 1.1 * count(scorer.model)
    assert float(agent.value(agent.collect()).abs().max()) == 0
    agent.learn(100)


def test_dpo_without_a_reference_asks_the_model_as_it_starts():
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 8
    agent = DPO(textrl.TextEnv(Letters()), small_model(4, 8), peft_config=lora(), dataset=pairs, batch_size=16)
    assert agent.update(agent.collect())["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_a_run_with_an_adapter_goes_on_where_it_stopped(tmp_path):
    def make():
        base = small_model(4, 8)
        return PPO(environment(base), base, peft_config=lora(), learning_rate=1e-2, batch_size=16)

    whole = make().learn(600)
    stopped = make()
    stopped.learn(600, log_dir=tmp_path, checkpoint_every=1, callback=lambda agent, _: agent.num_timesteps < 300)
    resumed = make().learn(600, log_dir=tmp_path, resume=True)
    assert resumed.num_timesteps == whole.num_timesteps
    for one, two in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_weights_are_shared_only_where_they_are_equal():
    model, other = add_adapter(small_model(4, 8), lora()), small_model(4, 8, seed=1)
    assert not share_base(model, other)
    assert storage(model, other) > 1.9 * count(other)
    same = small_model(4, 8)
    assert share_base(model, same)
    assert storage(model, same) < 1.1 * count(same)
    assert storage(model, twin(model)) < 1.2 * count(same)
    assert not lies_at(same, "no/such/folder")


def test_what_is_wrong_is_said():
    base = small_model(4, 8)
    with pytest.raises(ValueError, match="model and the environment's reference are one object"):
        PPO(environment(base), base)
    with pytest.raises(ValueError, match="peft_config must be a config of peft for adapters in layers"):
        PPO(environment(base), base, peft_config={"r": 4})
    with pytest.raises(ValueError, match="trainable_layers must be None for a model with an adapter"):
        PPO(environment(base), base, peft_config=lora(), trainable_layers=1)


@pytest.mark.parametrize("start", ["pissa", "olora", "corda"])
def test_adapters_that_change_the_base_are_refused(start):
    with pytest.raises(ValueError, match=rf"peft_config.init_lora_weights must be one that leaves .*; got '{start}'"):
        PPO(environment(None, 0.0), small_model(4, 8), peft_config=lora(init_lora_weights=start))
    with pytest.raises(ValueError, match=r"peft_config.bias must be \"none\"; got 'all'"):
        PPO(environment(None, 0.0), small_model(4, 8), peft_config=lora(bias="all"))
    with pytest.raises(ValueError, match=r"peft_config.task_type must be \"CAUSAL_LM\"; got .*SEQ_CLS"):
        PPO(environment(None, 0.0), small_model(4, 8), peft_config=lora(task_type="SEQ_CLS"))


KINDS = {
    "lora": lambda: lora(fan_in_fan_out=False),
    "dora": lambda: lora(fan_in_fan_out=False, use_dora=True),
    "norms": lambda: lora(fan_in_fan_out=False, modules_to_save=["norm"]),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_merged_and_loaded_as_it_is(kind, tmp_path):
    examples = [{"prompt": "a", "completion": "bb"}]
    settings = {"learning_rate": 3e-2, "batch_size": 4, "device": "cpu"}
    agent = SFT(environment(None, 0.0), llama(), dataset=examples, peft_config=KINDS[kind](), **settings).learn(300)
    tokens = torch.tensor([[0, 1, 2, 3]])
    with torch.no_grad():
        want = agent.model.base_model(input_ids=tokens).last_hidden_state
        scorer = RewardModel.from_language_model(agent.model, agent.tokenizer)
        torch.testing.assert_close(scorer.model.base_model(input_ids=tokens).last_hidden_state, want)
        assert not torch.allclose(llama().base_model(input_ids=tokens).last_hidden_state, want, atol=1e-2)
        agent.save(tmp_path / "agent")
        loaded = load_model(tmp_path / "agent")
        torch.testing.assert_close(loaded.base_model(input_ids=tokens).last_hidden_state, want)
    with pytest.raises(ValueError, match="model must be a whole one, as from_language_model makes it"):
        RewardModel(adapted_critic(agent.model, agent.model), agent.tokenizer)


def test_the_base_is_kept_where_an_agent_is_saved_over_it(tmp_path):
    REINFORCE(environment(None, 0.0), llama()).save(tmp_path / "model")
    agent = REINFORCE(environment(None, 0.0), tmp_path / "model", peft_config=lora())
    agent.save(tmp_path / "model")
    again = REINFORCE.load(tmp_path / "model", environment(None, 0.0))
    for name, weight in base_weights(agent.model).items():
        assert torch.equal(weight, base_weights(again.model)[name])


def test_a_critics_own_tokenizer_is_asked_for_where_only_its_adapter_is_saved(tmp_path):
    other = textrl.symbol_tokenizer("cab")
    env = environment(None, 0.0)
    scorer = RewardModel.from_language_model(llama(), other)
    agent = PPO(env, llama(), peft_config=lora(fan_in_fan_out=False), critic=scorer, batch_size=4, device="cpu")
    agent.save(tmp_path / "agent")
    with pytest.raises(ValueError, match="whose critic has a tokenizer of its own: give critic="):
        PPO.load(tmp_path / "agent", env)
    rollout = agent.collect()
    assert torch.equal(PPO.load(tmp_path / "agent", env, critic=scorer).value(rollout), agent.value(rollout))


def test_the_exact_answer_takes_a_peft_model(tmp_path):
    torch.manual_seed(0)
    reference = small_model(4, 8)
    agent = PPO(environment(reference), copy.deepcopy(reference), peft_config=lora(), batch_size=8, device="cpu")
    agent.learn(200)
    agent.save(tmp_path / "agent")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "agent")
    found = [
        textrl.evaluate_exact(Letters(), model, reference=reference, kl_coef=0.1) for model in (agent.model, loaded)
    ]
    assert found[0].kl > 0
    assert found[0].objective == pytest.approx(found[1].objective, abs=1e-9)


@pytest.mark.parametrize("make", [lambda: small_model(4, 8), llama], ids=["gpt2", "llama"])
def test_a_reward_model_is_made_of_a_model_with_an_adapter(make):
    settings = {"dataset": [{"prompt": "a", "completion": "bb"}], "peft_config": lora(fan_in_fan_out=False)}
    agent = SFT(environment(None, 0.0), make(), learning_rate=1e-2, batch_size=4, device="cpu", **settings).learn(100)
    scorer = RewardModel.from_language_model(agent.model, agent.tokenizer)
    assert not has_adapter(scorer.model)
    tokens = torch.tensor([[0, 1, 2, 3]])
    with torch.no_grad():
        found = scorer.model.base_model(input_ids=tokens).last_hidden_state
        expected = agent.model.base_model(input_ids=tokens).last_hidden_state
        plain = make().base_model(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, plain, atol=1e-3)


def test_an_equal_reference_gives_up_its_own_copy_of_the_base():
    base = small_model(4, 8)
    env = environment(copy.deepcopy(base))
    agent = REINFORCE(env, base, peft_config=lora())
    theirs = base_weights(env.reference)
    for name, weight in base_weights(agent.model).items():
        assert weight.data_ptr() == theirs[name].data_ptr()


def test_an_adapter_starts_from_the_agents_seed():
    def started(seed):
        agent = REINFORCE(environment(small_model(4, 8)), small_model(4, 8), peft_config=lora(), seed=seed)
        return torch.cat([p.flatten() for p in agent.model.parameters() if p.requires_grad])

    assert torch.equal(started(0), started(0)) and not torch.equal(started(0), started(1))


def test_a_critic_on_a_trunk_of_its_own_comes_back_and_moves_nothing_else(tmp_path):
    base, other = llama(), llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    scorer = RewardModel.from_language_model(other, Letters().tokenizer)
    agent = PPO(environment(base), base, critic=scorer, peft_config=lora(target_modules=["q_proj"]), batch_size=8)
    agent.learn(40)
    agent.save(tmp_path / "agent")
    fresh = environment(copy.deepcopy(llama()))
    again = PPO.load(tmp_path / "agent", fresh)
    tokens = torch.tensor([[0, 1, 2, 3]])
    for mine, theirs in (
        (again.model, agent.model),
        (fresh.reference, agent.env.reference),
        (again.critic.base_model, agent.critic.base_model),
    ):
        torch.testing.assert_close(mine(tokens)[0], theirs(tokens)[0], atol=1e-6, rtol=1e-6)
    assert storage(again.model, fresh.reference) == storage(agent.model, agent.env.reference)


def test_below_float32_a_new_adapter_is_its_reference_and_the_dtype_of_a_given_model_stays():
    model = llama()
    settings = {"peft_config": lora(target_modules=["q_proj"], fan_in_fan_out=False), "batch_size": 32}
    kept = PPO(environment(model), model, **settings)
    assert (model.dtype, kept.config.dtype) == (torch.float32, "float32")
    agent = PPO(environment(model), model, dtype="bfloat16", **settings)
    assert agent.model.dtype == torch.bfloat16
    rollout = agent.collect()
    assert rollout.drift > 0 and torch.equal(rollout.logprobs, rollout.ref_logprobs)


@pytest.mark.parametrize("with_reference", [True, False])
def test_a_critic_on_a_trunk_of_its_own_does_not_read_the_policys_frozen_blocks_once_it_is_loaded(
    with_reference, tmp_path
):
    base, other = llama(), llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    scorer = RewardModel.from_language_model(other, Letters().tokenizer)
    upper = lora(target_modules=["q_proj"], layers_to_transform=[1], fan_in_fan_out=False, init_lora_weights=False)

    def fresh():
        return environment(llama()) if with_reference else environment(None, 0.0)

    agent = PPO(fresh(), base, critic=scorer, peft_config=upper, batch_size=8, learning_rate=1e-2).learn(40)
    agent.save(tmp_path / "agent")
    again, rollout = PPO.load(tmp_path / "agent", fresh()), agent.collect()
    assert rollout.below is not None
    torch.testing.assert_close(again.value(rollout), agent.value(rollout), atol=1e-6, rtol=1e-6)


def test_an_adapter_that_cannot_be_saved_is_refused():
    config = peft.RandLoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"peft_config.peft_type must be one whose weights can be saved; got .*RAND"):
        PPO(environment(None, 0.0), llama(), peft_config=config)
