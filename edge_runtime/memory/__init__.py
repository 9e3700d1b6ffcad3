"""Memory on this device: `probe` asks what there is, `plan` fits an order into it, `guard` enforces and measures.

The prediction itself is `wire.memory`, because the coordinator runs it too. Nothing here loads numpy.
"""
