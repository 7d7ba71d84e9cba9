"""The keys of tensordicts, with the shapes of their tensors."""

OBSERVATION = ("agents", "observation")  # [envs, time, agents, features]
ACTION = ("agents", "action")  # [envs, time, agents, features]; discrete: [envs, time, agents]
REWARD = ("agents", "reward")  # [envs, time, agents, 1]
EPISODE_RETURN = ("agents", "episode_return")  # [envs, time, agents, 1], summed since the reset
STEP_COUNT = "step_count"  # [envs, time, 1], frames since the reset
DONE, TERMINATED, TRUNCATED = "done", "terminated", "truncated"  # [envs, time, 1] each

# The memory before a frame, of networks that have one; the networks write the memory after it under "next".
MEMORY = ("agents", "memory")  # [envs, time, agents, units], of the policy
CRITIC_MEMORY = "critic_memory"  # [envs, time, rows, units]; one row for a central critic, else one for each agent

Key = str | tuple[str, ...]
CARRIED: tuple[Key, ...] = (OBSERVATION, EPISODE_RETURN, STEP_COUNT, DONE, TERMINATED, TRUNCATED)  # between frames
MEMORIES: tuple[Key, ...] = (MEMORY, CRITIC_MEMORY)  # also carried between frames
FOLLOWING: tuple[Key, ...] = (*CARRIED, REWARD)  # the result of a frame, under "next"


def next_key(key: Key) -> Key:
    """Return the key under which a frame holds the value of `key` after its action."""
    return ("next", *((key,) if isinstance(key, str) else key))


FRAME: tuple[Key, ...] = (*CARRIED, ACTION, *(next_key(key) for key in FOLLOWING))
