"""The networks' memory: its equations, its resets, what it may see, and chunks against frames."""

import math
from itertools import pairwise

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from mappo.config import from_dict, override
from mappo.environment.environment import make_environment, require_memory_for_batch
from mappo.environment.keys import (
    ACTION,
    CRITIC_MEMORY,
    DONE,
    MEMORY,
    OBSERVATION,
    STEP_COUNT,
    next_key,
)
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.errors import ConfigError
from mappo.learning.learner import ADVANTAGE, LOG_PROB, Learner, standardise
from mappo.learning.memory import RecurrentNetwork, first_memory, in_chunks, remembering
from mappo.learning.networks import VALUE, make_networks
from tests.conftest import CPU, TINY
from tests.learning.test_gradients import traced_and_direct
from tests.learning.test_learner import make, prepare
from tests.support.runs import batches

KINDS = {
    "central": {},
    "own": {"critic": "own"},
    "own networks": {"critic": "own", "share_policy": False},
    "normalised": {"normalise_observations": True, "normalise_values": True},
}


def with_memory(**changes):
    """Return the configuration TINY with a memory of 5 units, chunks of 10 frames, and episodes of 7 frames."""
    networks = {"memory": "gru", "memory_size": 5, **changes.pop("networks", {})}
    return override(from_dict(TINY), {"environment": {"max_episode_frames": 7}, "networks": networks}, changes)


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def config(request):
    return with_memory(networks=request.param)


def one_unit():
    """Return a network of one unit whose gates are always 1/2: memory' = (tanh(x + memory / 2) + memory) / 2."""
    cell, output = nn.GRUCell(1, 1), nn.Linear(2, 1)
    with torch.no_grad():
        for parameter in (*cell.parameters(), *output.parameters()):
            parameter.zero_()
        cell.weight_ih[2], cell.weight_hh[2], output.weight[0, 1] = 1.0, 1.0, 1.0
    return RecurrentNetwork(cell, output)


def test_memory_is_reset_where_an_episode_begins_as_computed_by_hand():
    """The memory before the chunk is 0.5; its second frame begins an episode."""
    is_first = torch.tensor([False, True, False]).reshape(1, 3, 1, 1)
    features = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
    outputs = one_unit().unroll(features, is_first, torch.full((1, 1, 1), 0.5))
    first = (math.tanh(1 + 0.25) + 0.5) / 2
    second = math.tanh(2) / 2
    third = (math.tanh(3 + second / 2) + second) / 2
    assert outputs.flatten().tolist() == pytest.approx([first, second, third])


def torch_gru(network):
    """Return torch's own GRU with the weights of a network."""
    cell = network.cell
    gru = nn.GRU(cell.input_size, cell.hidden_size, batch_first=True)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    gru.load_state_dict({f"{name}_l0": getattr(cell, name) for name in names})
    return gru


def test_network_equals_torchs_own_gru_frame_by_frame_and_unrolled():
    network = RecurrentNetwork(nn.GRUCell(3, 6), nn.Linear(9, 2))
    features, memory = torch.randn(5, 8, 1, 3), torch.rand(5, 1, 6) * 2 - 1
    with torch.no_grad():
        memories, _ = torch_gru(network)(features[:, :, 0], memory.transpose(0, 1).contiguous())
        expected = network.network(torch.cat([features[:, :, 0], memories], -1))
        unrolled = network.unroll(features, torch.zeros(5, 8, 1, 1, dtype=torch.bool), memory)
        torch.testing.assert_close(unrolled[:, :, 0], expected)
        for time in range(8):
            outputs, memory = network(features[:, time], memory)
            torch.testing.assert_close(outputs[:, 0], expected[:, time])


def test_gradients_reach_back_to_the_start_of_the_episode_and_no_further():
    network = RecurrentNetwork(nn.GRUCell(3, 6), nn.Linear(9, 2))
    features, memory = torch.randn(1, 8, 1, 3, requires_grad=True), torch.zeros(1, 1, 6)
    is_first = torch.zeros(1, 8, 1, 1, dtype=torch.bool)
    is_first[:, 3] = True
    network.unroll(features, is_first, memory)[:, 6].sum().backward()
    reached = features.grad.abs().sum((0, 2, 3)) > 0
    assert reached.tolist() == [False, False, False, True, True, True, True, False]


def collected(config, count=2):
    """Return networks and `count` batches in a row."""
    longer = override(config, {"collection": {"total_frames": count * config.collection.frames_per_batch}})
    with private_random_streams(0, Stream.TRAINING, CPU):
        environment = make_environment(config.environment, config.collection.num_envs, 0, Stream.TRAINING, CPU)
        networks = make_networks(config.networks, environment)
        return networks, [batch.clone() for batch in batches(environment, networks.player, longer.collection)]


def by_agent(network):
    """Return the two agents' networks, which may be one."""
    return list(network.networks) if hasattr(network, "networks") else [network] * 2


def memory_by_gru(network, features, step_count):
    """Return the memory [time, units] before each frame of one row, by torch's GRU, episode after episode."""
    memories, starts = [], [*(step_count == 0).nonzero().flatten().tolist(), len(features)]
    for start, end in pairwise(starts):
        outputs, _ = torch_gru(network)(features[None, start:end])
        memories += [torch.zeros(1, outputs.shape[-1]), outputs[0, :-1]]
    return torch.cat(memories)


@torch.no_grad()
def test_recorded_memory_equals_torchs_own_gru_over_the_episodes_of_two_batches(config):
    """The memory is 0 where an episode begins, and continues from batch to batch; agents see only themselves."""
    networks, parts = collected(config)
    batch = torch.cat(parts, dim=1)
    actor, critic = networks.policy[0].module, networks.critic.module
    assert (batch[STEP_COUNT] == 0).sum() > 6 * 5
    for env in range(6):
        steps, observation = batch[STEP_COUNT][env, :, 0], batch[OBSERVATION][env]
        inputs = actor.observation_normaliser(observation)
        for agent, network in enumerate(by_agent(actor.network)):
            expected = memory_by_gru(network, inputs[:, agent], steps)
            torch.testing.assert_close(batch[MEMORY][env, :, agent], expected)
        inputs = critic.observation_normaliser(observation)
        rows = inputs.flatten(1)[:, None] if critic.is_central else inputs
        for row, network in zip(range(rows.shape[1]), by_agent(critic.network), strict=False):
            expected = memory_by_gru(network, rows[:, row], steps)
            torch.testing.assert_close(batch[CRITIC_MEMORY][env, :, row], expected)


@torch.no_grad()
def test_one_pass_over_a_batch_equals_the_frames_played_one_after_the_other(config):
    """Log-probabilities, values, and the values of next observations, which end episodes, too."""
    networks, learner, batch = make(config)[1:]
    learner._estimate(batch)
    critic, memory = networks.critic.module, first_memory(networks.player, 6)
    for time in range(20):
        frame = batch[:, time]
        for key, value in memory.items():
            memory[key] = value.masked_fill(frame[STEP_COUNT].unsqueeze(-1) == 0, 0)
        state = TensorDict({}, batch_size=[6])
        state[OBSERVATION], state[MEMORY] = frame[OBSERVATION], memory[MEMORY]
        log_prob = networks.policy.get_dist(state).log_prob(frame[ACTION])
        torch.testing.assert_close(frame[LOG_PROB], log_prob)
        value, following = critic(frame[OBSERVATION], memory[CRITIC_MEMORY])
        next_value, _ = critic(frame[next_key(OBSERVATION)], following)
        torch.testing.assert_close(frame[VALUE], value)
        torch.testing.assert_close(frame[next_key(VALUE)], next_value)
        memory = {MEMORY: networks.policy[0](state)[next_key(MEMORY)], CRITIC_MEMORY: following}


@torch.no_grad()
@pytest.mark.parametrize("chunk_frames", [1, 4, 20])
def test_chunks_give_the_log_probabilities_and_values_of_the_batch(config, chunk_frames):
    """Some chunks begin in the middle of an episode, some hold the end of one."""
    changed = override(config, {"learner": {"chunk_frames": chunk_frames, "minibatch_frames": 120}})
    learner, batch = make(changed)[2:]
    chunks = prepare(learner, batch)
    assert chunks.shape == (120 // chunk_frames,)
    assert chunks[MEMORY].shape == (len(chunks), 2, 5)
    loss = learner._losses[0].loss
    policy, critic = loss.actor_network, loss.critic_network
    torch.testing.assert_close(policy.get_dist(chunks).log_prob(chunks[ACTION]), chunks[LOG_PROB])
    torch.testing.assert_close(critic(chunks.clone())[VALUE], chunks[VALUE])


def test_first_minibatch_has_ratio_one(config):
    changed = override(config, {"learner": {"epochs": 1, "minibatch_frames": 120, "learning_rate": 1e-9}})
    learner, batch = make(changed)[2:]
    losses = learner.update(batch)
    assert losses.clip_fraction == 0
    assert losses.kl == pytest.approx(0, abs=1e-6)
    assert losses.loss_policy == pytest.approx(0, abs=1e-5)


def test_chunks_hold_frames_in_order_and_the_memory_before_the_first(config):
    _, (batch,) = collected(config, 1)
    chunks = in_chunks(batch.select(OBSERVATION, MEMORY, CRITIC_MEMORY), 4)
    assert chunks.shape == (30,)
    for number in range(30):
        env, start = divmod(4 * number, 20)
        assert torch.equal(chunks[OBSERVATION][number], batch[OBSERVATION][env, start : start + 4])
        for key in (MEMORY, CRITIC_MEMORY):
            assert torch.equal(chunks[key][number], batch[key][env, start])


def test_every_epoch_visits_every_chunk_once(config):
    changed = override(config, {"learner": {"minibatch_frames": 50}})
    learner, batch = make(changed)[2:]
    chunks = prepare(learner, batch)
    chunks[OBSERVATION] = torch.arange(12)
    numbers = [minibatch[0] for minibatch in learner._shuffled(chunks)]
    assert [len(part) for part in numbers] == [5, 5, 2]
    assert torch.equal(torch.cat(numbers).sort().values, torch.arange(12))


@torch.no_grad()
def test_agents_remember_only_their_own_observations(config):
    """The policy never sees other agents, nor does an own critic; a central critic does."""
    networks, (batch,) = collected(config, 1)
    steps, observation = batch[STEP_COUNT], batch[OBSERVATION]
    disturbed = observation.clone()
    disturbed[:, :, 1] += 1.0
    memory = first_memory(networks.player, 6)
    for module, key in ((networks.policy[0].module, MEMORY), (networks.critic.module, CRITIC_MEMORY)):
        one, other = (module.unroll(values, steps, memory[key]) for values in (observation, disturbed))
        if key == MEMORY:
            one, other = one[0], other[0]
        is_same = torch.equal(one[:, :, 0], other[:, :, 0])
        assert is_same != (key == CRITIC_MEMORY and networks.critic.module.is_central)
        assert not torch.equal(one[:, :, 1], other[:, :, 1])


@torch.no_grad()
def test_remembering_policy_acts_as_the_unrolled_one_and_starts_anew_each_time(config):
    networks, (batch,) = collected(config, 1)
    actor, observation = networks.policy[0].module, batch[OBSERVATION][:, :5]
    steps = torch.arange(5).expand(6, 5).unsqueeze(-1)
    expected = actor.unroll(observation, steps, first_memory(networks.policy, 6)[MEMORY])[0]
    for _ in range(2):
        act = remembering(networks.policy)
        for time in range(5):
            state = TensorDict({}, batch_size=[6])
            state[OBSERVATION] = observation[:, time]
            torch.testing.assert_close(act(state)["agents", "loc"], expected[:, time])


@pytest.mark.parametrize(
    ("kind", "actions"),
    [("central", "continuous"), ("own networks", "discrete"), ("normalised", "multi-discrete")],
)
def test_traced_gradients_equal_those_of_autograd(kind, actions, monkeypatch):
    monkeypatch.setattr("mappo.compute.traced_function.DIRECT_CALLS", 0)
    learner = {"entropy_coefficient": 0.1, "chunk_frames": 4, "minibatch_frames": 60}
    config = with_memory(networks=KINDS[kind], environment={"actions": actions}, learner=learner)
    for traced, direct in gradients(config, "plain"):
        assert torch.equal(traced, direct)


def test_mixed_gradients_agree_to_the_precision_of_bfloat16(monkeypatch):
    monkeypatch.setattr("mappo.compute.traced_function.compile_graph", lambda graph, _: graph)
    config = with_memory(
        networks={"hidden_sizes": [64], "memory_size": 64},
        learner={"minibatch_frames": 640, "epochs": 1, "chunk_frames": 4},
        collection={"num_envs": 32},
    )
    ratios = [
        float((mixed - direct).norm() / direct.norm().clamp_min(1e-3))
        for mixed, direct in gradients(config, "mixed")
    ]
    assert 1e-4 < max(ratios) < 0.1, ratios


@pytest.mark.long
def test_compiled_gradients_agree_with_those_of_autograd(config):
    for compiled, direct in gradients(config, "fast"):
        torch.testing.assert_close(compiled, direct, rtol=1e-4, atol=1e-6)


def gradients(config, update):
    """Return pairs of traced and direct values and gradients, of a minibatch, by a policy that has changed."""
    learner, batch = make(config, update)[2:]
    learner.update(batch)
    chunks = prepare(learner, batch)
    chunks[ADVANTAGE] = standardise(chunks[ADVANTAGE])
    return list(zip(*traced_and_direct(learner, chunks[: max(7, len(chunks) // 2)]), strict=True))


def test_prepared_minibatches_have_the_shapes_of_the_update(monkeypatch):
    """What a run compiles before its first update is what the update calls."""
    compiled = []
    monkeypatch.setattr(
        "mappo.compute.traced_function.compile_graph", lambda graph, _: compiled.append(graph) or graph
    )
    environment, _, learner, batch = make(with_memory(learner={"chunk_frames": 4, "minibatch_frames": 80}), "fast")
    learner.prepare(environment.fake_tensordict(), 120)
    num_prepared = len(compiled)
    learner.update(batch)
    assert len(compiled) == num_prepared == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"collection": {"rollout_frames": 25}},
            "collection.rollout_frames = 25: not a multiple of learner.chunk_f",
        ),
        (
            {"learner": {"minibatch_frames": 64}},
            "learner.minibatch_frames = 64: not a multiple of learner.chunk_f",
        ),
        ({"learner": {"chunk_frames": 0}}, "learner.chunk_frames"),
        ({"learner": {"chunk_frames": 101}}, "learner.chunk_frames"),
        ({"networks": {"memory": "lstm"}}, "networks.memory"),
        ({"networks": {"memory_size": 0}}, "networks.memory_size"),
    ],
)
def test_configuration_that_cannot_be_is_refused_and_names_the_field(changes, message):
    with pytest.raises(ConfigError, match=message):
        override(with_memory(), changes)


def test_without_memory_the_length_of_chunks_has_no_effect():
    override(from_dict(TINY), {"collection": {"rollout_frames": 25}, "learner": {"minibatch_frames": 64}})


def test_memory_of_the_networks_counts_in_the_memory_that_a_batch_needs():
    """A frame of two agents and a central critic has 3 rows of 5 numbers of 4 bytes, and is there twice."""
    plain, remembering_config = from_dict(TINY), with_memory()
    with private_random_streams(0, Stream.TRAINING, CPU):
        needed = [require_memory_for_batch(config, CPU) for config in (plain, remembering_config)]
    assert needed[1] - needed[0] == 2 * 3 * 5 * 4 * 120


def test_done_frames_end_the_memory_in_the_carried_tensors(config):
    networks, parts = collected(config, 2)
    done = parts[0][next_key(DONE)][:, -1, 0]
    assert Learner(config.learner, networks, 1)._memories
    for key in (MEMORY, CRITIC_MEMORY):
        assert (parts[1][key][:, 0][done] == 0).all()
        assert (parts[1][key][:, 0][~done] != 0).any() or done.all()


def test_groups_of_unlike_agents_cannot_have_a_memory():
    config = override(with_memory(), {"environment": {"scenario": "simple_tag", "scenario_kwargs": {}}})
    with private_random_streams(0, Stream.TRAINING, CPU):
        environment = make_environment(config.environment, 1, 0, Stream.TRAINING, CPU)
        with pytest.raises(ConfigError, match="networks.memory = gru: the agents form 2 groups"):
            make_networks(config.networks, environment)
