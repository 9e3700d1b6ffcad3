"""The access rules for a broker of one's own, for any number of devices."""

from __future__ import annotations

from wire.errors import ConfigError

_PATTERNS = {
    "mosquitto": """\
# A device may hear the coordinator, the pieces of models and what is for it alone, and speak in its own name; nothing else.
# In mosquitto.conf: acl_file, allow_anonymous false, and on the listener of the devices
#   require_certificate true, use_identity_as_username true, use_username_as_clientid true
# (or password_file instead of the first two). The user name is the device's name.

user {coordinator}
topic readwrite e1/{federation}/#

pattern read e1/{federation}/m
pattern read e1/{federation}/b/#
pattern read e1/{federation}/d/%u/#
pattern write e1/{federation}/s/%u
pattern write e1/{federation}/u/+/%u/#
""",
    "emqx": """\
%% A device may hear the coordinator, the pieces of models and what is for it alone, and speak in its own name; nothing else.
%% For the file source of EMQX's authorization, with authorization.no_match = deny. The user name is the device's name. With
%% certificates: on the listener ssl_options.verify = verify_peer and ssl_options.fail_if_no_peer_cert = true; then
%% mqtt.peer_cert_as_username = cn, and mqtt.peer_cert_as_clientid = cn, so that nobody takes over the session of another.

{{allow, {{user, "{coordinator}"}}, all, ["e1/{federation}/#"]}}.
{{allow, all, subscribe, ["e1/{federation}/m", "e1/{federation}/b/#", "e1/{federation}/d/${{username}}/#"]}}.
{{allow, all, publish, ["e1/{federation}/s/${{username}}", "e1/{federation}/u/+/${{username}}/#"]}}.
{{deny, all}}.
""",
}
KINDS = tuple(_PATTERNS)


def patterns(kind: str, federation: str, coordinator: str) -> str:
    """Write the rules for a broker of one's own, for any number of devices.

    Raises:
        ConfigError: There are none for that kind of broker.
    """
    if kind not in _PATTERNS:
        raise ConfigError(f"--kind {kind!r}: there are {', '.join(KINDS)}")
    return _PATTERNS[kind].format(federation=federation, coordinator=coordinator)
