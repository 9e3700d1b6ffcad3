"""The equations that algorithms are made of: one per function, with its source; numpy only."""
