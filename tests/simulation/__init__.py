"""The deterministic fault simulation. What it is and how a seed replays: docs/design/simulation.md."""
