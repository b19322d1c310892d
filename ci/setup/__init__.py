"""Makes the environment."""
