"""--profile: a trace of some updates, and what took their time."""
