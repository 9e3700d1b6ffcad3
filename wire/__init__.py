"""The only thing that a device and a coordinator both know: words, bytes and topics.

Read in this order: `errors` (who is to blame), `spec` (a model as data), `messages` (what is said), `chunks` (how a
model travels), `link` (what carries it). The modules that the agent on a device needs import no numpy.
"""

VERSION = 1
"""Major version of the wire. It stands in the topic root and in every message; both sides must agree on it."""
