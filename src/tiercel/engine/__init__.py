"""Many requests at once, none of them read twice: see engine.py first."""
