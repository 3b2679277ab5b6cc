"""The planner: which setup meets a target, and why."""
