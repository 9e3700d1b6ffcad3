#!/bin/sh
# nestling: the app Termux:Boot runs this when the phone has started. The service daemon starts what `sv-enable` enabled.
set -eu
PREFIX=${PREFIX:-/data/data/com.termux/files/usr}
export PREFIX
PATH=$PREFIX/bin:$PATH
export PATH
timeout 10 termux-wake-lock || : # else the phone may sleep before the services are up; each of them takes it itself as well
SVDIR=$PREFIX/var/service
LOGDIR=$PREFIX/var/log
export SVDIR LOGDIR
exec service-daemon start
