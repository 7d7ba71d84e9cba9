"""VMAS scenarios of our own, named as `mappo.scenarios.<module>:Scenario`."""
