"""What runs on a device: a small agent that keeps the link, and a worker that trains one order and goes away."""

__version__ = "0.1.0"
