#!/bin/sh
# A service of termux-services: `sv up NAME` starts it, `sv down NAME` stops it. What it runs, and where, is in ./conf.
exec 2>&1
set -eu
wake_lock=yes folder=.
# shellcheck source=/dev/null # written when the service was installed; sets the words of the command
. ./conf
if [ "$wake_lock" = yes ]; then
  # Without it the processor sleeps and the connection dies. A helper that hangs must not hold the service up.
  timeout 10 termux-wake-lock || echo "no wake lock: Android may put the processor to sleep"
fi
cd "$folder"
exec "$@"
