"""How messages are carried: `mqtt` over a broker, `memory` within one process."""
