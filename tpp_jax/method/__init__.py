"""The method of the paper as pure functions: penalties, schedule, optax transforms."""
