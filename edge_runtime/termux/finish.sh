#!/bin/sh
# Runs when ./run has ended: $1 is its exit code, -1 after a signal, which then is in $2.
exec 2>&1
set -eu
code=${1:--1} signal=${2:-?}
wake_lock=yes final='' seconds_pause=15
# shellcheck source=/dev/null # written when the service was installed
. ./conf
name=${PWD##*/}

stays_down() { # by sv down, sv exit
  case "$(cat supervise/stat 2>/dev/null || :)" in
    *"want down"* | *"want exit"*) return 0 ;;
  esac
  return 1
}

if ! stays_down; then
  case " $final " in
    *" $code "*)
      echo "ended with $code, and would again: it stays down. When that is put right: sv up $name"
      sv down "$PWD"
      ;;
    *)
      case "$code" in
        -1) echo "killed by signal $signal; after 9 ask \`edge-runtime check\` about the phantom process killer" ;;
        *) echo "ended with $code" ;;
      esac
      # A service that dies at once would drain the battery.
      while [ "$seconds_pause" -gt 0 ] && ! stays_down; do
        sleep 1
        seconds_pause=$((seconds_pause - 1))
      done
      ;;
  esac
fi
if [ "$wake_lock" = yes ] && { stays_down || [ "$seconds_pause" -gt 0 ]; }; then
  # Termux has one lock for everything: it stays while another service of ours is up.
  for other in ../*/conf; do
    [ "$other" != "../$name/conf" ] || continue
    head -n 1 "$other" 2>/dev/null | grep -q '^# nestling' || continue
    case "$(cat "${other%/conf}/supervise/stat" 2>/dev/null || :)" in run*) exit 0 ;; esac
  done
  timeout 10 termux-wake-unlock || :
fi
