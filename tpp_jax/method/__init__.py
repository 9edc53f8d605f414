"""The paper as pure functions of arrays: penalties, schedule, optax transforms."""
