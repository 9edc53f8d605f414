"""The paper as pure functions of arrays: penalties, strength schedule, optax transforms."""
