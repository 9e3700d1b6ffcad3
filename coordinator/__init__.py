"""What runs at the coordinator: the rounds, the algorithms and the journal. It never imports torch."""

__version__ = "0.1.0"
