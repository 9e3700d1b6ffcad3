#!/bin/sh
# What the service says goes to $PREFIX/var/log/sv/NAME/current, rotated: ten files of 1 MB at most.
set -eu
# shellcheck source=/dev/null # written when the service was installed
. ../conf
LOGDIR=${LOGDIR:-$PREFIX/var/log}
export LOGDIR
exec "$PREFIX/share/termux-services/svlogger"
