"""The words of other servers' control planes and native routes, which RL frameworks speak."""
